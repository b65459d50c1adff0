"""A block of which only the residual stream at its ends is known."""

from collections.abc import Iterator

from clearspan.components.block import BlockBridge, Identity
from clearspan.points.catalogue import names_in_block


class StreamBlockBridge(BlockBridge):
    """A block of which only the residual stream that enters and leaves it is known.

    Args:
        name: Path of the list of blocks.
        reason: Why no more is known.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(name)

    def __post_init__(self) -> None:
        self.stages = ()
        self.is_parallel = False

    @property
    def layer_type(self) -> str:
        """What is said of the block."""
        return "unknown"

    @property
    def is_sum(self) -> bool:
        """It is not known."""
        return False

    @property
    def keeps_directions(self) -> bool:
        """It is not known."""
        return False

    @property
    def centres(self) -> bool:
        """It is not known."""
        return False

    def why_without(self, name: str) -> str | None:
        """Returns the reason, for every part that blocks have."""
        return self.reason

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields all points inside blocks."""
        for leaf in names_in_block():
            if leaf not in ("hook_resid_pre", "hook_resid_post"):
                yield f"{self.path}.{leaf}", self.reason

    def identities(self) -> Iterator[Identity]:
        """Yields nothing."""
        return iter(())
