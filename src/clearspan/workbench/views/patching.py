"""Patching: which values of one run, put into the other, carry what differs between two texts."""

from dataclasses import dataclass
from typing import Any, ClassVar

from clearspan import patching
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_kind
from clearspan.interventions import Intervention
from clearspan.sweep import Direction, LogitDifference, Sweep
from clearspan.sweep.findings import Findings
from clearspan.sweep.pair import checked_direction
from clearspan.workbench.views.view import Answer, Call, Prompt, View, Watch, prompt_lines


@dataclass(frozen=True)
class PatchingView(View):
    """A sweep of `clearspan.patching.patching_sweep`. It is kept after each batch, and goes on where it broke off.

    Attributes:
        clean: The text as it is.
        corrupted: Another of as many tokens.
        answer_token: Whose logit is measured.
        incorrect_token: Whose logit is subtracted.
        position: Where logits are read; negative from the last.
        point: A hook point's short name.
        by: The axes of the map.
        direction: Which run is changed.
        layers: The layers; by default all.
        positions: The positions; by default all.
        memory: Bytes that a batch may take; by default half of what is free.
        interventions: Made in every cell.
    """

    clean: Prompt
    corrupted: Prompt
    answer_token: int
    incorrect_token: int | None = None
    position: int = -1
    point: str = "resid_pre"
    by: tuple[str, ...] = ("layer", "position")
    direction: Direction = "denoising"
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    memory: int | None = None
    interventions: tuple[Intervention, ...] = ()

    kind: ClassVar[str] = "patching"

    def __post_init__(self) -> None:
        check_kind(int, answer_token=self.answer_token, position=self.position)
        check_kind(int, type(None), incorrect_token=self.incorrect_token)
        check_kind(str, point=self.point)
        check_kind(tuple, by=self.by)
        check_kind(tuple, type(None), layers=self.layers, positions=self.positions)
        checked_direction(self.direction)
        if self.memory is not None:
            check_counts(memory=self.memory)

    def _call(self) -> Call:
        """Returns the call that makes the sweep."""
        metric = LogitDifference(self.answer_token, self.incorrect_token, self.position)
        places = {"layer": self.layers, "position": self.positions}
        keywords = {"direction": self.direction, "background": self.interventions}
        return Call(
            "clearspan.patching",
            patching.patching_sweep,
            self._prompts,
            (metric, self.point, self.by),
            {**keywords, **{axis: given for axis, given in places.items() if given is not None}},
        )

    @property
    def _prompts(self) -> dict[str, Prompt]:
        return {"clean": self.clean, "corrupted": self.corrupted}

    def run(self, bridge: TransformerBridge, watch: Watch) -> Answer:
        """Returns the metric by cell. The plan is shown first, and the map after each batch."""
        watch.tell("plan", 0, 1)
        sweep: Sweep = self._call().of(bridge)
        if watch.begun is not None and "done" in watch.begun.tensors:
            found = {name: one for name, one in watch.begun.tensors.items() if name not in ("mean", "share")}
            sweep.findings = Findings.of_tensors(found, len(sweep.grid.cells), sweep.metrics)
        facts = self._facts(sweep, str(sweep.plan(self.memory)))
        watch.show(Answer(facts, watch.begun.tensors if watch.begun is not None else {}))

        def tell(stage: str, done: int, total: int) -> None:
            watch.show(_map(sweep, facts))
            watch.tell(stage, done, total)

        sweep.run(self.memory, progress=tell)
        return _map(sweep, facts)

    def _facts(self, sweep: Sweep, plan: str) -> dict[str, Any]:
        return {
            "plan": plan,
            "axes": {axis: list(labels) for axis, labels in sweep.grid.axes},
            "changed": "corrupted" if self.direction == "denoising" else "clean",
            "unit": "logits",
        }

    def lines(self) -> list[str]:
        """Returns the Python that computes it."""
        memory = "" if self.memory is None else str(self.memory)
        return [
            *prompt_lines(self._prompts),
            f"sweep = {self._call().python()}",
            f"found = sweep.run({memory})",
            "print(found)",
        ]


def _map(sweep: Sweep, facts: dict[str, Any]) -> Answer:
    """Returns what the sweep has found so far: findings, their mean by cell, and the share of the way it restores."""
    found = sweep.result()
    ends = {
        "base": found.base[name].mean().item() if (name := next(iter(found.values))) in found.base else None,
        **{f"source {run}": own[name].mean().item() for run, own in found.sources.items()},
    }
    maps = {"mean": found.mean(), "share": found.normalised()}
    return Answer({**facts, "ends": ends}, {**sweep.findings.tensors(), **maps})
