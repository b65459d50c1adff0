"""What is left of a component's module when its parts are named."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from clearspan.components.base import GeneralizedComponent
from clearspan.points import HookPoint


@dataclass(eq=False, repr=False)
class RemainderBridge(GeneralizedComponent):
    """A module, or parameters, that a component uses in a way that none of its parts describes. It has no points.

    Attributes:
        parameters: Names of parameters and buffers in the module around this one that are accounted for instead of a
            module of its own.
        reads_stream: Whether it reads what the component around it reads; the norm before that is then not folded.
    """

    _: KW_ONLY
    parameters: tuple[str, ...] = ()
    reads_stream: bool = False

    def claims(self) -> Iterator[str]:
        """Yields the module, or the parameters."""
        if self.name is not None:
            yield self.module_path
        for name in self.parameters:
            yield f"{self.parent_path}.{name}" if self.parent_path else name

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields nothing: how rows and positions lie in its tensors is not known."""
        return iter(())
