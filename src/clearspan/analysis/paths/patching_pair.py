"""Two runs of a model, on a clean and a corrupted input: which is patched with values of which, what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._run.hooks import Hooks
from clearspan._run.sources import MaskedInput, Source
from clearspan.analysis.metric import Metric, measured
from clearspan.analysis.places import Input, encoded, padding_of
from clearspan.bridge import TransformerBridge
from clearspan.cache import ActivationCache
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import Grid, LogitMetric, Sweep, SweepResult
from clearspan.sweep.metrics import Context, at_places

PatchingDirection = Literal["denoising", "noising"]
"""Whether the corrupted run is patched with clean values, or the clean run with corrupted ones."""


@dataclass(frozen=True, eq=False)
class PatchingRun:
    """What one run left.

    Attributes:
        cache: What was kept of it.
        output: What it returned: logits, or the last residual stream where only some logits are read out.
        value: The metric, for each row, on the CPU; one row where it is one number for all.
    """

    cache: ActivationCache
    output: Tensor
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
            InvalidArgumentError: The inputs have not one shape or not one padding, the direction is unknown, the model
                is in training mode, or other hooks are on it.
        """
        if direction not in get_args(PatchingDirection):
            raise InvalidArgumentError(f"unknown direction {direction!r}", expected="'denoising' or 'noising'")
        if bridge.hf_model.training:
            raise InvalidArgumentError(
                "runs are compared in evaluation mode", got="training mode", fix="bridge.hf_model.eval()"
            )
        listening = next((point.name for point in bridge.index if point.is_listening), None)
        if listening is not None:
            raise InvalidArgumentError(
                "hooks are on the model, which would be part of both runs", where=listening, fix="bridge.reset_hooks()"
            )
        inputs = [encoded(bridge, one, attention_mask) for one in (clean, corrupted)]
        clean_ids, other_ids = (ids for ids, _ in inputs)
        masks = [torch.ones_like(ids) if mask is None else mask for ids, mask in inputs]
        if clean_ids.shape != other_ids.shape or not torch.equal(*masks):
            raise InvalidArgumentError(
                "the two inputs do not lie position on position",
                expected="one shape and one padding",
                got=" and ".join(
                    f"{list(ids.shape)} with {int((mask == 0).sum())} padded"
                    for (ids, _), mask in zip(inputs, masks, strict=True)
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
        return f"{self.base_name} run {base.mean():z.4f}, {self.source_name} run {source.mean():z.4f}"

    # --- runs --------------------------------------------------------------------------------------------------------

    @property
    def is_declared(self) -> bool:
        """Whether the metric says which logits it reads, and compares with no other run, so that no others are made."""
        return isinstance(self.metric, LogitMetric) and self.metric.reference is None

    @property
    def stop(self) -> int | None:
        """Where runs stop: after the last block, where only some logits are read out; None for at the logits."""
        return self.bridge.cfg.n_layers if self.is_declared else None

    @torch.no_grad()
    def source_run(self, names: Sequence[str]) -> PatchingRun:
        """Returns the run that gives values, with some points kept."""
        output, cache = self.bridge.run_with_cache(
            self.source, list(names), attention_mask=self.mask, stop_at_layer=self.stop
        )
        return PatchingRun(cache, output, self._numbers(output, self._measure(output, self.source, output, output)))

    @torch.no_grad()
    def base_run(self, names: Sequence[str]) -> ActivationCache:
        """Returns what is kept of the run that is patched."""
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

        def total(output: Tensor) -> Tensor:
            found = self.on_graph(output, source, base)
            values.append(self._numbers(output, found))
            return found.sum()

        with self.bridge.hooks(fwd_hooks):
            output, cache = self.bridge.run_with_cache(
                self.base, list(names), attention_mask=self.mask, incl_bwd=total, stop_at_layer=self.stop
            )
        return PatchingRun(cache, output, values[0])

    def on_graph(self, output: Tensor, source: PatchingRun, base: PatchingRun | None = None) -> Float[Tensor, "*row"]:
        """Returns the metric of what a run of the base returned, on its graph. Arguments are those of `graded_run`."""
        own = output.detach() if base is None else base.output
        return self._measure(output, self.base, own, source.output)

    def check_slope(self) -> None:
        """Raises if the metric's gradient at the base is zero whatever the model: its distance from the base itself."""
        if isinstance(self.metric, LogitMetric) and self.metric.reference in ("base", self.base_name):
            raise InvalidArgumentError(
                f"the gradient of {self.metric_name} from the base run is zero at the base run",
                got=f"against={self.metric.reference!r}",
                reason="there it is least, so that a first-order approximation of every effect is zero",
                fix=f"against={self.source_name!r}, or edge_attribution(..., steps=5)",
            )

    def _measure(self, output: Tensor, tokens: Tensor, base: Tensor, source: Tensor) -> Float[Tensor, "*row"]:
        """Returns the metric of what a run returned.

        Args:
            output: What it returned.
            tokens: The run's.
            base: What the run that is patched returned.
            source: What the other run returned.
        """
        if not isinstance(self.metric, LogitMetric):
            return self.metric(output)
        if self.is_declared:
            places = self.metric.places(*tokens.shape)
            logits = self.bridge.read_out(at_places(output, places), self.metric.tokens)
            return self.metric.of(logits, Context(tokens, self.mask))
        runs = {"base": base, self.base_name: base, self.source_name: source}
        return self.metric.measure(output, Context(tokens, self.mask, runs))

    @staticmethod
    def _numbers(output: Tensor, found: Tensor) -> Float[Tensor, "row"]:
        return measured(lambda _: found, output)

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
