"""Attention: where each head of a layer looks."""

from dataclasses import dataclass
from typing import ClassVar

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts
from clearspan.interventions import Intervention
from clearspan.model import check_layers
from clearspan.points import get_act_name
from clearspan.workbench.views.view import Answer, Prompt, View, Watch, made_in, prompt_lines


@dataclass(frozen=True)
class AttentionView(View):
    """The pattern of one layer, as `run_with_cache` gives it.

    Attributes:
        prompt: The text.
        layer: Counted from 0.
        interventions: Made in the run.
    """

    prompt: Prompt
    layer: int
    interventions: tuple[Intervention, ...] = ()

    kind: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        check_counts(0, layer=self.layer)

    @property
    def _point(self) -> str:
        return get_act_name("pattern", self.layer)

    def run(self, bridge: TransformerBridge, watch: Watch) -> Answer:
        """Returns attention by head, query and key position."""
        watch.tell(self.kind, 0, 1)
        check_layers(bridge, "attn", [self.layer])
        with bridge.hooks(interventions=self.interventions):
            _, cache = bridge.run_with_cache(self.prompt.rows, self._point, return_type=None)
        pattern = cache[self._point][0].float().cpu()
        return Answer({"layer": self.layer, "tokens": list(self.prompt.tokens)}, {"pattern": pattern})

    def lines(self) -> list[str]:
        """Returns the Python that computes it."""
        run = f"_, cache = bridge.run_with_cache(prompt, {self._point!r}, return_type=None)"
        return [
            *prompt_lines({"prompt": self.prompt}),
            *made_in(self.interventions, run),
            f"found = cache[{self._point!r}][0].float().cpu()  # [head, query position, key position]",
            "print(found)",
        ]
