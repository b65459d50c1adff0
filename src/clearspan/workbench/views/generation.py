"""Generation: how the model continues a text, with the alternatives at each step."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from clearspan.analysis.words import words_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.interventions import Intervention
from clearspan.modes import no_grad
from clearspan.workbench.views.view import Answer, Prompt, View, Watch, made_of, named, prompt_lines

_KEYWORDS: dict[str, Any] = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}


@dataclass(frozen=True)
class GenerationView(View):
    """`bridge.generate`, always the likeliest token.

    Attributes:
        prompt: The text.
        length: New tokens at most.
        top: Alternatives at each step.
        interventions: Made in the generation.
    """

    prompt: Prompt
    length: int = 20
    top: int = 5
    interventions: tuple[Intervention, ...] = field(default=())

    kind: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        check_counts(length=self.length, top=self.top)

    @no_grad
    def run(self, bridge: TransformerBridge, watch: Watch) -> Answer:
        """Returns the new tokens with the likeliest at each step; shown as they are made."""

        def step(tokens: Tensor, scores: Any) -> bool:
            done = tokens.shape[1] - len(self.prompt.tokens)
            watch.show(self._answer(bridge, tokens, scores))
            watch.tell("tokens", done, self.length)
            return False

        watch.tell("tokens", 0, self.length)
        found = bridge.generate(
            self.prompt.rows, self.length, interventions=self.interventions, stopping_criteria=[step], **_KEYWORDS
        )
        return self._answer(bridge, found.sequences, found.scores)

    def _answer(self, bridge: TransformerBridge, sequences: Tensor, scores: tuple[Tensor, ...]) -> Answer:
        added = sequences[0, len(self.prompt.tokens) :].cpu()
        top = torch.stack([one[0].float().cpu().softmax(-1) for one in scores]).topk(self.top)
        tensors = {
            "tokens": added.to(torch.int32),
            "top_ids": top.indices.to(torch.int32),
            "top_probability": top.values,
        }
        return Answer({"words": named(words_of(bridge, added, top.indices))}, tensors)

    def lines(self) -> list[str]:
        """Returns the Python that computes it."""
        keywords = ", ".join(f"{name}={value}" for name, value in _KEYWORDS.items())
        made = f", interventions={made_of(self.interventions)}" if self.interventions else ""
        return [
            *prompt_lines({"prompt": self.prompt}),
            f"found = bridge.generate(prompt, {self.length}{made}, {keywords})",
            f"found = found.sequences[0, {len(self.prompt.tokens)}:]",
            "print(bridge.to_string(found) if bridge.tokenizer else found)",
        ]
