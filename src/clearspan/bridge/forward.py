"""The forward: the model's own, on a checked input, for the part of the model asked for."""

import contextlib
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clearspan.bridge.index import Segment
from clearspan.bridge.inputs import ModelInput
from clearspan.bridge.loss import lm_loss
from clearspan.errors import InvalidArgumentError, UnwritableError
from clearspan.hf.compiled import refuse_compiled
from clearspan.hf.segments import Stopped, starting_at, stopping_at

if TYPE_CHECKING:
    from clearspan.bridge.transformer_bridge import TransformerBridge

ReturnType = Literal["logits", "loss", "both"]
Output = Tensor | tuple[Tensor, Tensor] | None


def run(
    bridge: "TransformerBridge",
    given: ModelInput,
    segment: Segment,
    return_type: ReturnType | None,
    loss_per_token: bool = False,
) -> Output:
    """Runs the model and returns what was asked for; a run that stops at a layer returns the residual stream there."""
    check_return_type(return_type)
    start, stop = segment
    if return_type in ("loss", "both") and (stop is not None or given.tokens is None or given.tokens.shape[1] < 2):
        what = "a run that stops at a layer" if stop is not None else "embeddings or a residual stream"
        raise InvalidArgumentError(
            "a loss needs logits and at least two tokens",
            got=what if stop is not None or given.tokens is None else "one token",
        )
    bridge.taps.writers.clear()
    if segment == (None, None):
        output = bridge.hf_model(**given.kwargs).logits
    else:
        _refuse_kv_cache(given, segment)
        output = run_segment(bridge, given, start, stop)
    lost = gradients_lost(bridge)
    if lost is not None:
        guard_gradients(bridge, output.residual if isinstance(output, Stopped) else output, lost)
    bridge.taps.writers.clear()
    if isinstance(output, Stopped):
        return output.residual
    logits = output
    match return_type:
        case "logits":
            return logits
        case None:
            return None
    assert given.tokens is not None, "checked above"
    loss = lm_loss(logits, given.tokens, given.mask, loss_per_token)
    return loss if return_type == "loss" else (logits, loss)


def check_return_type(return_type: object) -> None:
    """Raises unless it is one of the four."""
    if return_type not in ("logits", "loss", "both", None):
        raise InvalidArgumentError(f"unknown return_type {return_type!r}", expected="'logits', 'loss', 'both' or None")


def _refuse_kv_cache(given: ModelInput, segment: Segment) -> None:
    if "past_key_values" in given.kwargs:
        start, stop = segment
        raise InvalidArgumentError(
            "a KV cache goes with a run of the whole model",
            got=f"start_at_layer={start}, stop_at_layer={stop}",
            reason="layers that are not run would not be extended",
        )


def run_segment(
    bridge: "TransformerBridge", given: ModelInput, start: int | None, stop: int | None
) -> Tensor | Stopped:
    """Runs some of the blocks; returns logits, or the residual stream where it stopped."""
    blocks = [block.module for block in bridge.blocks]
    if not bridge.taps.is_suspended:
        bridge.index.check_reached((point for point in bridge.index if point.is_listening), (start, stop))
    refuse_compiled([bridge.hf_model, *blocks])
    with contextlib.ExitStack() as stack:
        if start is not None:
            residual = given.kwargs.get("inputs_embeds")
            if residual is None:
                raise InvalidArgumentError(
                    f"start_at_layer={start} needs the residual stream entering that layer",
                    expected=f"[batch, pos, d_model={bridge.cfg.d_model}]",
                    got="token ids",
                    fix=f"bridge(cache['resid_pre', {start}], start_at_layer={start})",
                )
            if start == stop:
                return Stopped(residual)
            returns_tuple = bridge.blocks[0].returns_tuple
            stack.enter_context(starting_at(blocks, start, residual, returns_tuple=returns_tuple))
            if residual.shape[-1] != bridge.embed.width:  # a projection of the embedding comes before the blocks
                given.kwargs["inputs_embeds"] = residual.new_zeros(*residual.shape[:-1], bridge.embed.width)
        if stop is not None:
            stack.enter_context(stopping_at(blocks, stop))
        try:
            return bridge.hf_model(**given.kwargs).logits
        except Stopped as stopped:
            return stopped


def gradients_lost(bridge: "TransformerBridge") -> str | None:
    """Returns why a write by hooks that are gone before `backward` would make gradients wrong, or None."""
    model = bridge.hf_model
    checkpoints = model.training and any(vars(module).get("gradient_checkpointing") for module in model.modules())
    if torch.is_grad_enabled() and checkpoints:
        return "gradient checkpointing computes the forward again during backward, when these hooks are gone"
    return None


def guard_gradients(bridge: "TransformerBridge", output: Tensor, lost: str) -> None:
    """Has a later `backward` raise if by then a listener is gone that wrote in this forward."""
    writers = list(bridge.taps.writers)

    def check(_: Tensor) -> None:
        for point, listener in writers:
            if listener not in point.listeners("fwd"):
                raise UnwritableError(
                    "gradients would be wrong: a hook that wrote in the forward is gone",
                    where=point.name,
                    reason=lost,
                    fix="with bridge.hooks(fwd_hooks=...): around forward and backward",
                )

    if writers and output.requires_grad:
        output.register_hook(check)
