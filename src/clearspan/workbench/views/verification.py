"""Verification: whether this model's points read and write as they promise."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_choice
from clearspan.workbench.views.view import Answer, View, Watch


@dataclass(frozen=True)
class VerificationView(View):
    """`bridge.verify`.

    Attributes:
        level: How much is checked.
    """

    level: Literal["quick", "full"] = "quick"

    kind: ClassVar[str] = "verification"

    def __post_init__(self) -> None:
        check_choice(("quick", "full"), level=self.level)

    def run(self, bridge: TransformerBridge, watch: Watch) -> Answer:
        """Returns the checks."""
        watch.tell(self.kind, 0, 1)
        return Answer({"verification": bridge.verify(self.level).to_dict()})

    def lines(self) -> list[str]:
        """Returns the Python that computes it."""
        return [f"found = bridge.verify({self.level!r})", "print(found)"]
