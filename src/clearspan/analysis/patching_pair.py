"""Two runs of a model, on a clean and a corrupted input: which is patched with values of which, and what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan.bridge import ActivationCache, TransformerBridge
from clearspan.bridge.hooks import Hooks
from clearspan.bridge.sources import MaskedInput, Source
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import Grid, LogitMetric, Sweep, SweepResult
from clearspan.sweep.metrics import Context

from .metric import Metric, measured
from .places import Input, encoded, padding_of

PatchingDirection = Literal["denoising", "noising"]
"""Whether the corrupted run is patched with clean values, or the clean run with corrupted ones."""


@dataclass(frozen=True, eq=False)
class PatchingRun:
    """What one run left.

    Attributes:
        cache: What was kept of it.
        logits: What the model returned.
        value: The metric, for each row, on the CPU; one row where it is one number for all.
    """

    cache: ActivationCache
    logits: Float[Tensor, "row pos d_vocab"]
    value: Float[Tensor, "row"]


@dataclass(frozen=True, eq=False)
class PatchingPair:
    """Two inputs of one shape, and what is measured of the patched one.

    Attributes:
        bridge: The model.
        clean: Token ids.
        corrupted: The other ones.
        mask: Their padding mask, or None where nothing is padded.
        metric: What is measured.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.
    """

    bridge: TransformerBridge
    clean: Int[Tensor, "row pos"]
    corrupted: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"] | None
    metric: Metric
    direction: PatchingDirection

    @classmethod
    def of(
        cls,
        bridge: TransformerBridge,
        clean: Input,
        corrupted: Input,
        metric: Metric,
        direction: PatchingDirection,
        attention_mask: Int[Tensor, "row pos"] | None,
    ) -> Self:
        """Returns the pair, encoded and checked.

        Raises:
            InvalidArgumentError: The inputs have not one shape or not one padding, an unknown direction, or the model
                is in training mode.
        """
        if direction not in get_args(PatchingDirection):
            raise InvalidArgumentError(f"unknown direction {direction!r}", expected="'denoising' or 'noising'")
        if bridge.hf_model.training:
            raise InvalidArgumentError(
                "runs are compared in evaluation mode", got="training mode", fix="bridge.hf_model.eval()"
            )
        inputs = [encoded(bridge, input, attention_mask) for input in (clean, corrupted)]
        (clean_ids, clean_mask), (other_ids, other_mask) = inputs
        masks = [torch.ones_like(ids) if mask is None else mask for ids, mask in inputs]
        if clean_ids.shape != other_ids.shape or not torch.equal(*masks):
            raise InvalidArgumentError(
                "the two inputs do not lie position on position",
                expected="one shape and one padding",
                got=" and ".join(
                    f"{list(ids.shape)} with {int((mask == 0).sum())} padded"
                    for ids, mask in zip((clean_ids, other_ids), masks, strict=True)
                ),
            )
        return cls(bridge, clean_ids, other_ids, padding_of(masks[0]), metric, direction)

    @property
    def base_name(self) -> str:
        """Which run is patched."""
        return "corrupted" if self.direction == "denoising" else "clean"

    @property
    def source_name(self) -> str:
        """Which run gives values."""
        return "clean" if self.direction == "denoising" else "corrupted"

    @property
    def base(self) -> Int[Tensor, "row pos"]:
        """The ids of the run that is patched."""
        return self.corrupted if self.direction == "denoising" else self.clean

    @property
    def source(self) -> Int[Tensor, "row pos"]:
        """The ids of the run that gives values."""
        return self.clean if self.direction == "denoising" else self.corrupted

    @property
    def metric_name(self) -> str:
        """What is measured, in words."""
        return self.metric.kind.replace("_", " ") if isinstance(self.metric, LogitMetric) else "the metric"

    def described(self, base: Float[Tensor, "row"], source: Float[Tensor, "row"]) -> str:
        """Returns the metric of both runs, in words."""
        return f"{self.base_name} run {base.mean():.4f}, {self.source_name} run {source.mean():.4f}"

    # --- runs --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def source_run(self, names: Sequence[str]) -> PatchingRun:
        """Returns the run that gives values, with some points kept."""
        logits, cache = self.bridge.run_with_cache(self.source, list(names), attention_mask=self.mask)
        found = self._measure(logits, self.source, self._references(logits, self.source_name))
        return PatchingRun(cache, logits, measured(lambda _: found, logits))

    @torch.no_grad()
    def base_run(self, names: Sequence[str], fwd_hooks: Hooks = ()) -> ActivationCache:
        """Returns what is kept of the run that is patched, with hooks on it or without."""
        with self.bridge.hooks(fwd_hooks):
            return self.bridge.run_with_cache(self.base, list(names), attention_mask=self.mask, return_type=None)[1]

    @torch.enable_grad()
    def graded_run(
        self, names: Sequence[str], source: PatchingRun, base: PatchingRun | None = None, fwd_hooks: Hooks = ()
    ) -> PatchingRun:
        """Returns the run that is patched, with some points kept and the gradients of the metric there.

        Args:
            names: The points.
            source: The other run.
            base: The run that is patched, where hooks make this one another.
            fwd_hooks: Hooks on the run.
        """
        values: list[Tensor] = []

        def total(logits: Tensor) -> Tensor:
            found = self.on_graph(logits, source, base)
            values.append(measured(lambda _: found, logits))
            return found.sum()

        with self.bridge.hooks(fwd_hooks):
            logits, cache = self.bridge.run_with_cache(
                self.base, list(names), attention_mask=self.mask, incl_bwd=total
            )
        return PatchingRun(cache, logits, values[0])

    def on_graph(self, logits: Tensor, source: PatchingRun, base: PatchingRun | None = None) -> Float[Tensor, "*row"]:
        """Returns the metric of the base's logits, on their graph. Arguments are those of `graded_run`."""
        own = logits.detach() if base is None else base.logits
        references = self._references(source.logits, self.source_name) | self._references(own, self.base_name, "base")
        return self._measure(logits, self.base, references)

    def check_slope(self) -> None:
        """Raises if the metric's gradient at the base is zero whatever the model: its distance from the base itself."""
        if isinstance(self.metric, LogitMetric) and self.metric.reference in ("base", self.base_name):
            raise InvalidArgumentError(
                f"the gradient of {self.metric_name} from the base run is zero at the base run",
                got=f"against={self.metric.reference!r}",
                reason="there it is least, so that a first-order approximation of every effect is zero",
                fix=f"against={self.source_name!r}, or edge_attribution(..., steps=5)",
            )

    def _measure(self, logits: Tensor, tokens: Tensor, references: Mapping[str, Tensor]) -> Float[Tensor, "*row"]:
        if isinstance(self.metric, LogitMetric):
            return self.metric.measure(logits, Context(tokens, self.mask, references))
        return self.metric(logits)

    def _references(self, logits: Tensor, *names: str) -> dict[str, Tensor]:
        needed = self.metric.reference if isinstance(self.metric, LogitMetric) else None
        return {name: logits for name in names if name == needed}

    # --- exact patching ----------------------------------------------------------------------------------------------

    def swept(self, grid: Grid, sources: Mapping[str, Source] | None = None) -> SweepResult:
        """Returns the metric of the base run with each cell's interventions, computed exactly.

        Args:
            grid: The cells. The runs of the pair are the sources `clean` and `corrupted`.
            sources: Further ones.
        """
        pair: dict[str, Source] = {
            "clean": MaskedInput(self.clean, self.mask),
            "corrupted": MaskedInput(self.corrupted, self.mask),
        }
        everything = {**pair, **(sources or {})}
        sweep = Sweep(self.bridge, self.base, grid, self.metric, sources=everything, attention_mask=self.mask)
        return sweep.run(progress=False)
