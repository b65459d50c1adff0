"""From which layers a run may start: blocks may read keys of earlier layers, or the tokens beside the stream."""

from collections.abc import Sequence

from clearspan.components.block import BlockBridge
from clearspan.components.shared_attention import SharedKeysAttentionBridge


def sources_of(block: BlockBridge) -> list[int]:
    """Returns the layers of which a block needs something besides the stream, such as the keys that it attends to."""
    shared = [part.source for part in block.attentions if isinstance(part, SharedKeysAttentionBridge)]
    return shared + [part.reads_layer for part in block.walk() if part.reads_layer is not None]


def first_of(blocks: Sequence[BlockBridge], layer: int) -> int:
    """Returns the last layer, at most `layer`, from which a run needs nothing of the layers before it.

    Args:
        blocks: The blocks of all layers.
        layer: A layer; as many as there are blocks for what comes after them.

    Example:
        >>> import clearspan
        >>> first_of(clearspan.boot("tiny-bigcode").blocks, 2)
        2
    """
    first = layer
    while True:
        before = min([first, *(source for block in blocks[first:] for source in sources_of(block))])
        if before == first:
            return first
        first = before


def reads_tokens(blocks: Sequence[BlockBridge]) -> bool:
    """Whether blocks read something that the model makes of the tokens, besides the residual stream."""
    return any(part.reads_tokens for block in blocks for part in block.walk())
