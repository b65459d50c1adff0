"""Pairs: a clean and a corrupted input, what is measured of them, and which of them is changed."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, Self, TypeVar, get_args

from torch import Tensor

from clearspan._run.continuation import check_undisturbed
from clearspan.bridge import TransformerBridge
from clearspan.errors import InvalidArgumentError, argument
from clearspan.inputs import Batch, Input
from clearspan.sweep.metrics import LogitMetric, Metric

Direction = Literal["denoising", "noising"]
"""Whether the corrupted run is changed by clean values, or the clean run by corrupted ones."""
Measured = Metric | Mapping[str, Metric]
"""What is measured: a metric, or several by name."""
Own = TypeVar("Own", bound=Measured)


def checked_direction(direction: object) -> Direction:
    """Returns a direction.

    Raises:
        InvalidArgumentError: It is neither of the two.
    """
    if direction not in get_args(Direction):
        raise InvalidArgumentError(f"unknown direction {direction!r}", expected="'denoising' or 'noising'")
    return direction  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class Pair(Generic[Own]):
    """Two inputs whose rows lie position on position, what is measured, and which of the two is changed.

    Attributes:
        bridge: The model.
        clean: The prompts as they are.
        corrupted: The other prompt of each pair, in the clean one's columns.
        metric: What is measured.
        direction: `"denoising"`: the corrupted run is the base, and gets clean values. `"noising"`: the reverse.

    Example:
        >>> import clearspan
        >>> from clearspan.sweep import LogitDifference
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> metric = LogitDifference.between(bridge, " os", " re")
        >>> pair = Pair.of(bridge, "import os", "import re", metric)
        >>> pair.base_name, pair.source_name
        ('corrupted', 'clean')
    """

    _bridge: TransformerBridge | weakref.ref[TransformerBridge]
    clean: Batch
    corrupted: Batch
    metric: Own
    direction: Direction = "denoising"

    @classmethod
    def of(
        cls,
        bridge: TransformerBridge,
        clean: Input,
        corrupted: Input,
        metric: Own,
        direction: Direction = "denoising",
        attention_mask: Tensor | None = None,
    ) -> Self:
        """Returns the pair of two inputs, checked.

        Args:
            bridge: The model, in evaluation mode, with no hooks on it.
            clean: Any input.
            corrupted: Another, with as many rows, and as many real tokens in each.
            metric: What is measured.
            direction: Which of the two is changed.
            attention_mask: 1 for real tokens, of an input that is bare token ids with padding, or of both.

        Raises:
            InvalidArgumentError: The inputs do not lie position on position, the direction is unknown, the model is in
                training mode, or hooks are on it.
        """
        checked_direction(direction)
        check_undisturbed(bridge)
        batches = []
        for name, one in (("clean", clean), ("corrupted", corrupted)):
            with argument(name):
                given = bridge.to_batch(one)
                is_told = attention_mask is None or not given.is_bare
                batches.append(given if is_told else bridge.to_batch(one, attention_mask))
        first, second = batches
        if first.attention is not None or second.attention is not None:
            raise InvalidArgumentError("a pair is padded by a mask of two axes", got="a mask of four axes")
        with argument("corrupted"):
            second = second.laid_out_as(first)
        return cls(bridge, first, second, metric, direction)

    @property
    def bridge(self) -> TransformerBridge:
        """The model.

        Raises:
            InvalidArgumentError: This is the pair of a result, and the bridge was deleted.
        """
        bridge = self._bridge() if isinstance(self._bridge, weakref.ref) else self._bridge
        if bridge is None:
            raise InvalidArgumentError(
                "the bridge of these results is gone",
                reason="results do not keep a model in memory",
                fix="keep the bridge for as long as results are to be compared with runs",
            )
        return bridge

    def of_result(self) -> Self:
        """Returns the pair as a result holds it: it does not keep the model in memory."""
        return replace(self, _bridge=weakref.ref(self.bridge))

    @property
    def base_name(self) -> str:
        """Which run is changed."""
        return "corrupted" if self.direction == "denoising" else "clean"

    @property
    def source_name(self) -> str:
        """Which run gives values."""
        return "clean" if self.direction == "denoising" else "corrupted"

    @property
    def base(self) -> Batch:
        """The input of the run that is changed."""
        return self.corrupted if self.direction == "denoising" else self.clean

    @property
    def source(self) -> Batch:
        """The input of the run that gives values."""
        return self.clean if self.direction == "denoising" else self.corrupted

    @property
    def metric_name(self) -> str:
        """What is measured, in words."""
        return self.metric.kind.replace("_", " ") if isinstance(self.metric, LogitMetric) else "the metric"
