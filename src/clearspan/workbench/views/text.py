"""A text: how likely each token was, and what the model expects in its place."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from clearspan import analysis
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.workbench.views.view import Answer, Call, OneText, named


@dataclass(frozen=True)
class TextView(OneText):
    """`clearspan.analysis.predictions`.

    Attributes:
        top: Likeliest next tokens of each position.
    """

    top: int = 10

    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        check_counts(top=self.top)

    def call(self) -> Call:
        """Returns the call."""
        return Call("clearspan.analysis", analysis.predictions, {"prompt": self.prompt}, (), {"k": self.top})

    def answer(self, found: Any, bridge: TransformerBridge) -> Answer:
        """Returns probabilities by position; of a first token NaN."""
        tensors = {
            "tokens": found.tokens.to(torch.int32),
            "probability": found.token_probs,
            "top_ids": found.top_ids.to(torch.int32),
            "top_probability": found.top_probs,
        }
        return Answer({"words": named(found.words)}, tensors)
