"""What a report says first: the prediction that it explains, and the token that most of it comes from."""

import math
from dataclasses import dataclass

from clearspan.analysis import Report
from clearspan.plots import visible

NOTICEABLE = 0.1
"""Nats below which no single token is named as a cause."""


@dataclass(frozen=True)
class Cause:
    """The token, before the one after which it is predicted, without which the prediction falls most.

    Attributes:
        token: As it is written.
        position: Where it stands.
        layer: The layer whose input was replaced there.
        drop: By how many nats the log-probability falls.
    """

    token: str
    position: int
    layer: int
    drop: float

    @property
    def is_most(self) -> bool:
        """Whether the probability falls to less than half."""
        return self.drop > math.log(2)


@dataclass(frozen=True)
class Headline:
    """The prediction and its strongest cause.

    Attributes:
        token: The prediction, as it is written.
        probability: Given to it.
        cause: None where no single earlier token matters.
        is_likeliest: Whether the model gives no other token more.
        after: Where it is predicted, as "after ·x at 3, "; empty after the last token.
    """

    token: str
    probability: float
    cause: Cause | None
    is_likeliest: bool = True
    after: str = ""

    def __str__(self) -> str:
        """One sentence."""
        found = f"{self.after}{'predicts' if self.is_likeliest else 'gives'} {self.token}, {self.probability:z.2f}"
        if self.cause is None:
            return f"{found}; no single earlier token decides it"
        how = "most of it comes from" if self.cause.is_most else "it depends most on"
        return f"{found}; {how} {self.cause.token} at {self.cause.position}"


def headline(report: Report) -> Headline:
    """Returns the headline of a report.

    The position after which it is predicted is no cause, since all that is predicted passes there; nor is the first,
    where models park attention, so that replacing it disturbs everything.
    """
    at, probability = report.predicted_at, math.exp(report.effect.log_prob)
    drop = report.effect.drop[:, 1:at].nan_to_num(nan=-math.inf)
    cause = None
    if drop.numel() and drop.max() >= NOTICEABLE:
        layer, place = divmod(int(drop.argmax()), drop.shape[1])
        token = visible(report.tokens[place + 1], 24)
        cause = Cause(token, place + 1, layer, drop[layer, place].item())
    likeliest = int(report.predictions.top_ids[at, 0]) == report.effect.targets[0]
    after = "" if at == len(report.tokens) - 1 else f"after {visible(report.tokens[at], 24)} at {at}, "
    return Headline(visible(report.target, 24), probability, cause, likeliest, after)
