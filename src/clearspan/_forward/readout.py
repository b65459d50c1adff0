"""From the last residual stream to logits: all of them, or those of some tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clearspan._forward.forward import run_segment
from clearspan._forward.given import ModelInput
from clearspan.inputs import Batch
from clearspan.model import Model
from clearspan.weights.processing import final_norm, readout


def read_out(
    model: Model, residual: Float[Tensor, "batch pos d_model"], tokens: Sequence[int] | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Returns the logits that the model makes of a last residual stream; no listener hears of it.

    Args:
        model: The model.
        residual: The stream after the last block.
        tokens: The tokens whose logits are computed, in order; None for all, by the model's own code.
    """
    with model.taps.suspended():
        if tokens is None or model.unembed.is_quantised:
            given = ModelInput(Batch(None, embeds=residual), {"inputs_embeds": residual, "use_cache": False})
            logits = run_segment(model, given, model.cfg.n_layers, None)
            assert isinstance(logits, Tensor), "a run that does not stop ends with logits"
            return logits if tokens is None else logits[..., list(tokens)]
        return _of_tokens(model, residual, tokens)


def _of_tokens(model: Model, residual: Tensor, tokens: Sequence[int]) -> Tensor:
    """Returns some tokens' logits by the parts that read the stream out: a norm, linear maps, a scale, a cap."""
    norm, maps, cfg = final_norm(model), readout(model), model.cfg
    value = residual if norm is None else norm.module(residual)
    for part in maps[:-1]:
        value = part.module(value)
    rows = torch.tensor(tokens, device=value.device)
    bias = maps[-1].bias_or_none()
    logits = functional.linear(value, maps[-1].matrix[rows], None if bias is None else bias[rows]) * cfg.logit_scale
    cap = cfg.output_logits_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)
