"""Direct attribution: what each part of the model adds to a logit."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from clearspan import analysis
from clearspan.analysis.attribution import AttributionUnit
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_choice, check_kind
from clearspan.workbench.views.view import Answer, Call, OneText, named


@dataclass(frozen=True)
class AttributionView(OneText):
    """`clearspan.analysis.direct_logit_attribution`.

    Attributes:
        answer_token: Whose logit.
        incorrect_token: Whose logit is subtracted.
        position: Where it is read; negative from the last.
        unit: What the model is divided into.
    """

    answer_token: int = field(kw_only=True)
    incorrect_token: int | None = field(default=None, kw_only=True)
    position: int = field(default=-1, kw_only=True)
    unit: AttributionUnit = field(default="component", kw_only=True)

    kind: ClassVar[str] = "attribution"

    def __post_init__(self) -> None:
        check_kind(int, answer_token=self.answer_token, position=self.position)
        check_kind(int, type(None), incorrect_token=self.incorrect_token)
        check_choice(get_args(AttributionUnit), unit=self.unit)

    def call(self) -> Call:
        """Returns the call."""
        function, keywords = analysis.direct_logit_attribution, {"unit": self.unit, "pos": self.position}
        answers = (self.answer_token, self.incorrect_token)
        return Call("clearspan.analysis", function, {"prompt": self.prompt}, answers, keywords)

    def answer(self, found: Any, bridge: TransformerBridge) -> Answer:
        """Returns what each part adds, in logits, with the sum and the model's own."""
        facts = {
            "parts": list(found.parts),
            "unit": found.unit,
            "constant": found.constant.item(),
            "total": found.total.item(),
            "model": found.model.item(),
            "words": named(found.words),
        }
        return Answer(facts, {"logits": found.attribution})
