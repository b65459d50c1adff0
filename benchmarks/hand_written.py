"""What people write without a library: torch hooks that keep activations, and loops that patch them.

The metric of every loop is the difference of two logits at the last position.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from reference import Reference

Tokens = Int[Tensor, "row pos"]
Streams = list[Float[Tensor, "row pos d_model"]]
Cell = tuple[int, int]
"""A layer, and a position or head."""

CORRECT, INCORRECT = 5, 7
"""The tokens of the metric."""


def logit_difference(logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row"]:
    """Returns the metric, in float32."""
    return logits[:, -1, CORRECT].float() - logits[:, -1, INCORRECT].float()


# --- keeping activations ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pre_hook(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Has a function see a module's input, and change it if it returns one."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = function(args[0])
        return None if changed is None else (changed, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def everything(reference: Reference, tokens: Tokens) -> dict[Any, Any]:
    """Keeps the input and output of every module that clearspan's cache keeps, and attention's patterns under eager."""
    kept: dict[Any, Any] = {}

    def both(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept[name, 0] = args  # none where the caller names what it passes; then it is another module's output
            kept[name, 1] = output

        return hook

    handles = []
    for name, module in reference.model.named_modules():
        if isinstance(module, reference.kept):
            handles.append(module.register_forward_hook(both(name)))
    reference.model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def residuals(reference: Reference, tokens: Tokens) -> Streams:
    """Keeps every block's output."""
    kept: Streams = []

    def keep(_: nn.Module, __: object, output: Any) -> None:
        kept.append(output)

    handles = [block.register_forward_hook(keep) for block in reference.blocks]
    reference.model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def inputs_of(
    reference: Reference, modules: Sequence[nn.Module], tokens: Tokens, kv_cache: DynamicCache | None = None
) -> Streams:
    """Keeps the input of each of some modules, and what a KV cache is given."""
    kept: Streams = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(pre_hook(module, kept.append))
        reference.model(tokens, past_key_values=kv_cache, use_cache=kv_cache is not None)
    return kept


# --- one forward for each cell ---------------------------------------------------------------------------------------


def patched_residuals(
    reference: Reference, tokens: Tokens, clean: Streams, cells: Sequence[Cell]
) -> Float[Tensor, "cell"]:
    """Returns the metric with the stream that enters a layer patched at one position, for each cell."""
    found = []
    for layer, position in cells:

        def patch(stream: Tensor, layer: int = layer, position: int = position) -> Tensor:
            stream = stream.clone()
            stream[:, position] = clean[layer][:, position]
            return stream

        with pre_hook(reference.blocks[layer], patch):
            found.append(logit_difference(reference.model(tokens, use_cache=False).logits)[0])
    return torch.stack(found)


def patched_heads(reference: Reference, tokens: Tokens, clean: Streams, cells: Sequence[Cell]) -> Float[Tensor, "cell"]:
    """Returns the metric with one head's output patched at all positions, for each cell.

    Args:
        reference: The model.
        tokens: The run that is changed.
        clean: The other run's inputs of attention's output projections.
        cells: Layers and heads.
    """
    found = []
    width = reference.model.config.hidden_size // reference.heads
    for layer, head in cells:

        def patch(z: Tensor, layer: int = layer, columns: slice = slice(head * width, (head + 1) * width)) -> Tensor:
            z = z.clone()
            z[..., columns] = clean[layer][..., columns]
            return z

        with pre_hook(reference.projections[layer], patch):
            found.append(logit_difference(reference.model(tokens, use_cache=False).logits)[0])
    return torch.stack(found)


# --- tiles -----------------------------------------------------------------------------------------------------------


def tiled_residuals(
    reference: Reference, tokens: Tokens, clean: Tokens, layers: int, positions: int
) -> Float[Tensor, "layer pos"]:
    """Returns the metric of all cells, in tiles of so many layers and positions.

    The cells of a tile are the rows of one batch. It starts at the tile's first layer, with the base run's residual
    stream, and at its first position, on the base run's keys and values.
    """
    blocks = reference.blocks
    length, patches, base = tokens.shape[1], inputs_of(reference, blocks, clean), DynamicCache()
    streams = inputs_of(reference, blocks, tokens, base)
    found = torch.empty(len(blocks), length, device=tokens.device)
    for layer, first in itertools.product(range(0, len(blocks), layers), range(0, length, positions)):
        at = slice(layer, layer + layers), slice(first, min(first + positions, length))
        cells = list(itertools.product(range(len(blocks))[at[0]], range(length)[at[1]]))
        stream = streams[layer][:, first:].repeat(len(cells), 1, 1)
        logits = _last_logits(reference, stream, cells, patches, _prefix(base, first, len(cells)), layer, first)
        found[at] = logit_difference(logits).view(found[at].shape)
    return found


def _last_logits(
    reference: Reference,
    stream: Float[Tensor, "cell pos d_model"],
    cells: Sequence[Cell],
    patches: Streams,
    prefix: DynamicCache | None,
    start: int,
    first: int,
) -> Float[Tensor, "cell 1 d_vocab"]:
    """Returns the logits at the last position of a batch that runs from one layer on, each row patched at its cell."""
    keywords = reference.keywords(stream, first, prefix)
    for layer, block in enumerate(reference.blocks):
        if layer >= start:
            for row, (at, position) in enumerate(cells):
                if at == layer:
                    stream[row, position - first] = patches[layer][0, position]
            stream = block(stream, **keywords)
    return reference.model.lm_head(reference.norm(stream[:, -1:]))


def _prefix(base: DynamicCache, length: int, rows: int) -> DynamicCache | None:
    """Returns a cache of a run's first keys and values, the same in all rows; None for no positions."""
    if length == 0:
        return None
    found = DynamicCache()
    for index, layer in enumerate(cast("Iterable[tuple[Tensor, Tensor, None]]", base)):
        keys, values = (part[:, :, :length].expand(rows, -1, -1, -1) for part in layer[:2])
        found.update(keys, values, index)
    return found
