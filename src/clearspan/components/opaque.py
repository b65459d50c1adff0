"""Parts of which only the ends are known."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from clearspan.components.base import GeneralizedComponent
from clearspan.components.weights import AbsentWeight

_UNKNOWN = "only the ends of this part are known"


@dataclass(eq=False, repr=False)
class OpaqueBridge(GeneralizedComponent):
    """A sublayer that no component describes: what it reads and adds is known, and nothing in between.

    It has its ends as points, `hook_in` and `hook_out`, and no weights by letter. What reads its input is not known, so
    a norm before it is not folded.

    Attributes:
        needs_more: What the model gives it beside its input, without which it cannot run alone; None where nothing.
    """

    _: KW_ONLY
    needs_more: str | None = None

    W_in = AbsentWeight(_UNKNOWN)
    W_gate = AbsentWeight(_UNKNOWN)
    W_out = AbsentWeight(_UNKNOWN)
    b_in = AbsentWeight(_UNKNOWN)
    b_gate = AbsentWeight(_UNKNOWN)
    b_out = AbsentWeight(_UNKNOWN)

    @property
    def why_not_alone(self) -> str | None:
        """Why the part cannot run alone, or None where it can."""
        return None if self.needs_more is None else f"it reads {self.needs_more} beside its input"

    def call_arguments(self, value: Tensor) -> dict[str, Any]:
        """Returns what the model itself would pass."""
        return self._bound.arguments_of(self.module, value)
