"""Reading out: the logits that the model makes of a last residual stream, all of them or those of some tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clearspan.bridge.forward import run_segment
from clearspan.bridge.inputs import ModelInput
from clearspan.weights.processing import final_norm, readout

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge


def read_out(
    bridge: "TransformerBridge", residual: Float[Tensor, "batch pos d_model"], tokens: Sequence[int] | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Returns the logits that the model makes of a last residual stream; no listener hears of it.

    Args:
        bridge: The model.
        residual: The stream after the last block.
        tokens: The tokens whose logits are computed, in order; None for all, by the model's own code.
    """
    with bridge.taps.suspended():
        if tokens is None or bridge.unembed.is_quantised:
            given = ModelInput({"inputs_embeds": residual, "use_cache": False}, None, None)
            logits = run_segment(bridge, given, bridge.cfg.n_layers, None)
            assert isinstance(logits, Tensor), "a run that does not stop ends with logits"
            return logits if tokens is None else logits[..., list(tokens)]
        return _of_tokens(bridge, residual, tokens)


def _of_tokens(bridge: "TransformerBridge", residual: Tensor, tokens: Sequence[int]) -> Tensor:
    """Returns some tokens' logits by the parts that read the stream out: a norm, linear maps, a scale, a cap."""
    norm, maps, cfg = final_norm(bridge), readout(bridge), bridge.cfg
    value = residual if norm is None else norm.module(residual)
    for part in maps[:-1]:
        value = part.module(value)
    rows = torch.tensor(tokens, device=value.device)
    bias = maps[-1].bias_or_none()
    logits = functional.linear(value, maps[-1].matrix[rows], None if bias is None else bias[rows]) * cfg.logit_scale
    cap = cfg.output_logits_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)
