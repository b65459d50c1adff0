"""The lens: what the model would predict at each depth."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from clearspan import analysis
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.workbench.views.view import Answer, Call, OneText, named


@dataclass(frozen=True)
class LensView(OneText):
    """`clearspan.analysis.lens_readings` of all positions.

    Attributes:
        top: Likeliest tokens of each depth and position.
    """

    top: int = 5

    kind: ClassVar[str] = "lens"

    def __post_init__(self) -> None:
        check_counts(top=self.top)

    def call(self) -> Call:
        """Returns the call."""
        keywords = {"positions": None, "top_k": self.top}
        return Call("clearspan.analysis", analysis.lens_readings, {"prompt": self.prompt}, (), keywords)

    def answer(self, found: Any, bridge: TransformerBridge) -> Answer:
        """Returns readings by depth and position; logarithms, divergence and entropy in nats."""
        tensors = {
            "top_ids": found.top_ids.to(torch.int32),
            "top_log_probability": found.top_log_probs,
            "target_log_probability": found.target_log_probs,
            "target_rank": found.target_ranks.to(torch.int32),
            "kl": found.kl,
            "entropy": found.entropy,
        }
        facts = {
            "words": named(found.words),
            "depths": list(found.depths),
            "tokens": list(self.prompt.tokens),
            "targets": found.target_ids.tolist(),
        }
        return Answer(facts, tensors)
