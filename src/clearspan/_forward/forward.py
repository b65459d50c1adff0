"""The forward: the model's own, on a checked input, for the part of the model asked for."""

import contextlib
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clearspan._forward.given import ModelInput
from clearspan._forward.starts import check_start, give_tokens
from clearspan.errors import InvalidArgumentError, UnwritableError, WholeForwardError
from clearspan.hf.modules import refuse_compiled
from clearspan.hf.segments import Stopped, starting_at, stopping_at
from clearspan.index import Segment
from clearspan.interrupts import let_through
from clearspan.model import Model
from clearspan.modes import uncompiled
from clearspan.scopes import is_foreign

ReturnType = Literal["logits", "loss", "both"]
Output = Tensor | tuple[Tensor, Tensor] | None


def run(
    model: Model,
    given: ModelInput,
    segment: Segment,
    return_type: ReturnType | None,
    loss_per_token: bool = False,
) -> Output:
    """Runs the model and returns what was asked for; a run that stops at a layer returns the residual stream there.

    It is part of the run under way, `model.taps.run`.
    """
    check_return_type(return_type)
    start, stop = segment
    if segment != (None, None) and model.adapter.whole_forwards:
        raise WholeForwardError(
            "blocks of this model are not run apart from the whole forward",
            got=f"start_at_layer={start}, stop_at_layer={stop}",
            reason=model.adapter.whole_forwards,
            fix="a run of the whole model; what blocks enter and leave with is in its cache, hook_resid_pre and "
            "hook_resid_post",
        )
    if return_type in ("loss", "both") and (stop is not None or given.batch.tokens is None or given.batch.width < 2):
        what = "a run that stops at a layer" if stop is not None else "embeddings or a residual stream"
        raise InvalidArgumentError(
            "a loss needs logits and at least two tokens",
            got=what if stop is not None or given.batch.tokens is None else "one token",
        )
    if segment == (None, None):
        output = let_through(uncompiled, model.hf_model, **given.kwargs).logits
    else:
        _refuse_kv_cache(given, segment)
        output = run_segment(model, given, start, stop)
    lost = gradients_lost(model)
    if lost is not None:
        guard_gradients(model, output.residual if isinstance(output, Stopped) else output, lost)
    if isinstance(output, Stopped):
        return output.residual
    logits = output
    match return_type:
        case "logits":
            return logits
        case None:
            return None
    loss = lm_loss(logits, given.batch.ids, given.batch.mask, loss_per_token)
    return loss if return_type == "loss" else (logits, loss)


def check_return_type(return_type: object) -> None:
    """Raises unless it is one of the four."""
    if return_type not in ("logits", "loss", "both", None):
        raise InvalidArgumentError(f"unknown return_type {return_type!r}", expected="'logits', 'loss', 'both' or None")


def _refuse_kv_cache(given: ModelInput, segment: Segment) -> None:
    if given.kv_cache is not None:
        start, stop = segment
        raise InvalidArgumentError(
            "a KV cache goes with a run of the whole model",
            got=f"start_at_layer={start}, stop_at_layer={stop}",
            reason="layers that are not run would not be extended",
        )


def _differs_from_embeddings(model: Model, residual: Tensor) -> bool:
    """Whether the model cannot be given a residual stream in place of embeddings.

    A projection of these may come before the blocks, the stream may have another dtype, or the model may scale
    embeddings in place.
    """
    has_own_dtype = model.blocks[0].stream_dtype is not None
    return residual.shape[-1] != model.embed.width or has_own_dtype or model.embed.output_is_overwritten


def run_segment(model: Model, given: ModelInput, start: int | None, stop: int | None) -> Tensor | Stopped:
    """Runs some of the blocks; returns logits, or the residual stream where it stopped."""
    blocks = [block.module for block in model.blocks]
    if model.taps.is_listening and not model.taps.turns.is_away:
        model.index.check_reached((point for point in model.index if point.is_heard), (start, stop))
    refuse_compiled([model.hf_model, *blocks])
    with contextlib.ExitStack() as stack:
        if start is not None:
            residual = given.kwargs.get("inputs_embeds")
            if residual is None:
                raise InvalidArgumentError(
                    f"start_at_layer={start} needs the residual stream entering that layer",
                    expected=f"[batch, pos, d_model={model.cfg.d_model}]",
                    got="token ids",
                    fix=f"bridge(cache['resid_pre', {start}], start_at_layer={start})",
                )
            if start == stop:
                return Stopped(residual)
            stack.enter_context(starting_at(blocks, start, model.blocks[0].raw_stream(residual)))
            if residual.ndim > 3 or _differs_from_embeddings(model, residual):
                dtype = residual.dtype if model.blocks[0].stream_dtype is None else model.hf_model.dtype
                size = (*residual.shape[:2], model.embed.width)
                given.kwargs["inputs_embeds"] = residual.new_zeros(size, dtype=dtype)
            give_tokens(model, given, residual, start)
            check_start(model, start, stop)
        if stop is not None:
            stack.enter_context(stopping_at(blocks, stop))
        try:
            return let_through(uncompiled, model.hf_model, **given.kwargs).logits
        except Stopped as stopped:
            return Stopped(model.blocks[0].shown_stream(stopped.residual))  # without frames, which keep the model


def gradients_lost(model: Model) -> str | None:
    """Returns why a write by hooks that are gone before `backward` would make gradients wrong, or None."""
    hf_model = model.hf_model
    checkpoints = hf_model.training and any(vars(module).get("gradient_checkpointing") for module in hf_model.modules())
    if torch.is_grad_enabled() and checkpoints:
        return "gradient checkpointing computes the forward again during backward, when these hooks are gone"
    return None


def guard_gradients(model: Model, output: Tensor, lost: str) -> None:
    """Has a later `backward` raise if by then a listener is gone that wrote in this forward."""
    run = model.taps.present
    writers = [] if run is None else list(run.writers)

    def check(_: Tensor) -> None:
        for point, listener in writers:
            is_on = listener in point.listeners("fwd")
            if not is_on or not (listener.is_heard or is_foreign()):
                raise UnwritableError(
                    "gradients would be wrong: a hook that wrote in the forward is gone",
                    where=point.name,
                    reason=lost,
                    fix="with bridge.hooks(fwd_hooks=...): around forward and backward",
                )

    if writers and output.requires_grad:
        output.register_hook(check)


def lm_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, "..."]:
    """Returns the cross-entropy of each next token, in nats, computed in float32 at least.

    Args:
        logits: `[batch, pos, d_vocab]`.
        tokens: `[batch, pos]`.
        mask: Padding mask `[batch, pos]`. Each real token but a row's last predicts the next real one.
        per_token: Whether to return `[batch, pos-1]`, zero where a prediction does not count, and not the mean.
    """
    exact = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    nexts, counts = tokens[:, 1:], None
    if mask is not None:
        after = _next_real(mask)[:, :-1]
        nexts, counts = tokens.gather(1, after.clamp(max=tokens.shape[1] - 1)), mask[:, :-1] * (after < tokens.shape[1])
    losses = functional.cross_entropy(exact.flatten(0, 1), nexts.flatten().long(), reduction="none")
    losses = losses.unflatten(0, exact.shape[:2])
    if counts is None:
        return losses if per_token else losses.mean()
    losses = losses * counts.to(losses.dtype)
    return losses if per_token else losses.sum() / counts.sum()


def _next_real(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Returns the column of the next real token after each column; past the last one, the number of columns."""
    width = mask.shape[1]
    columns = torch.arange(width, device=mask.device).where(mask.bool(), width)
    here = columns.flip(-1).cummin(-1).values.flip(-1)
    return torch.cat([here[:, 1:], here.new_full((len(here), 1), width)], dim=1)
