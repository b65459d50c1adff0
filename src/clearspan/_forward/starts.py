"""Runs that start at a layer: what they need besides the residual stream."""

from torch import Tensor

from clearspan._forward.given import ModelInput
from clearspan.components.starts import sources_of
from clearspan.errors import InvalidArgumentError
from clearspan.model import Model


def check_start(model: Model, start: int, stop: int | None) -> None:
    """Raises InvalidArgumentError if a layer that runs attends to keys of one before the start."""
    if model.firsts[start] == start:
        return
    for layer in range(start, len(model.blocks) if stop is None else stop):
        before = [source for source in sources_of(model.blocks[layer]) if source < start]
        if before:
            raise InvalidArgumentError(
                f"a run cannot start at layer {start}",
                reason=f"layer {layer} uses what layer {before[0]} found, such as its keys, which is not run",
                fix=f"start_at_layer={model.firsts[start]}, or a run of the whole model",
            )


def give_tokens(model: Model, given: ModelInput, residual: Tensor, start: int) -> None:
    """Gives a run that starts at a layer the tokens, in place of embeddings, where its blocks read them.

    Raises:
        InvalidArgumentError: They are not known.
    """
    ids = given.kwargs.pop("input_ids", None)
    if not model.reads_tokens:
        return
    if ids is None and start < len(model.blocks):
        raise InvalidArgumentError(
            f"a run that starts at layer {start} needs the tokens",
            got="the residual stream alone",
            reason="blocks have inputs of their own besides the stream, which the model makes of the tokens",
            fix="bridge.run_with_hooks(tokens, ...) with a hook on hook_resid_pre that writes the stream",
        )
    given.kwargs.pop("inputs_embeds")
    given.kwargs["input_ids"] = residual.new_zeros(residual.shape[:2]).long() if ids is None else ids
