"""Parts of which only the ends are known."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.weights import AbsentWeight
from clearspan.points import HookPoint, Side

_UNKNOWN = "only the ends of this part are known"


class OpaqueBridge(GeneralizedComponent):
    """A sublayer that no component describes: what it reads and adds is known, and nothing in between.

    It has its ends as points, `hook_in` and `hook_out`, and no weights by letter. What reads its input is not known, so
    a norm before it is not folded.
    """

    W_in = AbsentWeight(_UNKNOWN)
    W_gate = AbsentWeight(_UNKNOWN)
    W_out = AbsentWeight(_UNKNOWN)
    b_in = AbsentWeight(_UNKNOWN)
    b_gate = AbsentWeight(_UNKNOWN)
    b_out = AbsentWeight(_UNKNOWN)

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns what the model itself would pass."""
        return self._bound.arguments_of(self.module, value)


class AddingBridge(OpaqueBridge):
    """A sublayer whose module adds to the residual stream itself: what it reads is known, and what it adds.

    Its part `out` is the module whose output is added. What its own module gives is the stream after it.
    """

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns what gives the contribution."""
        return {"out": GeneralizedComponent}

    @property
    def last(self) -> GeneralizedComponent:
        """The part whose output is added."""
        return self.submodules["out"]

    def raw_ends(self) -> Iterator[HookPoint]:
        """Yields the input."""
        yield self.point("hook_in", self.place(Side.INPUT))
