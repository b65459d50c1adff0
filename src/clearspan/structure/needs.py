"""What modules are given besides the residual: the tokens, or what an earlier layer found of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clearspan.components import BlockBridge, GeneralizedComponent
from clearspan.structure.algebra import same
from clearspan.structure.tokens import ROWS
from clearspan.structure.trace import Trace, Visit


def note_needs(trace: Trace, blocks: Sequence[Visit], templates: Sequence[BlockBridge]) -> None:
    """Notes on the templates of blocks, and of their parts, which are given tokens or what an earlier layer found.

    What is the same for all rows, as masks and positions are, follows from the residual's shape.

    Args:
        trace: The traced forward.
        blocks: The blocks' calls.
        templates: Their templates.
    """
    for layer, (visit, block) in enumerate(zip(blocks, templates, strict=True)):
        for part, path in _parts(block, visit.path):
            call = next((one for one in trace.at(path) if visit.order <= one.order < visit.end), None)
            for value in () if call is None else _of_tokens(call):
                earlier = [index for index, one in enumerate(blocks[:layer]) if _gives(one, value)]
                if earlier:
                    part.reads_layer = earlier[0]
                else:
                    part.reads_tokens = True
            if call is not None and layer and _reads_again(call, blocks[0].entered):
                part.reads_tokens = True


def _parts(block: BlockBridge, path: str) -> Iterator[tuple[GeneralizedComponent, str]]:
    """Yields a block and its parts with modules, each with the module's path."""
    yield block, path
    for part in block.submodules.values():
        if part.name is not None:
            yield part, f"{path}.{part.name}"


def _of_tokens(call: Visit) -> Iterator[Tensor]:
    """Yields the whole numbers that a module is given besides its input, and that differ from row to row."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            rows = value.reshape(ROWS, -1) if value.numel() and value.shape[0] == ROWS else value.new_zeros(1, 1)
            if bool((rows != rows[:1]).any()):
                yield value


def _reads_again(call: Visit, embedded: Tensor | None) -> bool:
    """Whether a module is given the embeddings of the tokens beside its input (Zamba)."""
    given = (*call.args, *call.kwargs.values())
    tensors = [one for one in given if isinstance(one, Tensor) and embedded is not None and one.shape == embedded.shape]
    return any(torch.equal(one, embedded) for one in tensors if not same(one, call.entered))


def _gives(visit: Visit, value: Tensor) -> bool:
    return any(one is value for one in visit.outputs)
