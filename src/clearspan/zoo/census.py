"""The zoo's models checked: each one built, booted and verified, in parallel processes of one thread."""

import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from clearspan.architectures import ADAPTERS
from clearspan.bridge import boot
from clearspan.errors import ClearspanError, InvalidArgumentError, UnbuildableError, UnsupportedArchitectureError
from clearspan.hf.drawn import quiet
from clearspan.progress import Progress, shown
from clearspan.verification import FAULTS, Check, Level, Verification
from clearspan.zoo.models import build, class_name, types, why_unbuildable
from clearspan.zoo.parts import parts_of
from clearspan.zoo.pins import Pin, pins_of

Outcome = Literal["passes", "pinned", "fails", "unsupported", "not built"]
"""What came of a model type: all checks hold; all that fail are transformers' own fault; one fails; nothing serves it;
it has no tiny model."""

Adapted = Literal["by hand", "by structure", "not"]
"""How a model was adapted."""


@dataclass(frozen=True)
class Row:
    """What came of one model type.

    Attributes:
        model_type: The model type.
        architecture: The class of its models.
        outcome: What came of it.
        adapted: How it was adapted: by hand, by structure, or not at all.
        checks: How many checks were made.
        failures: The checks that fail and are not pinned, by group.
        pinned: The checks that fail and are pinned, each with the reason.
        reason: Why it was not verified, or what is wrong with its pins.
        parts: The kinds of its parts, by their names.
        seconds: How long it took.
    """

    model_type: str
    architecture: str
    outcome: Outcome
    adapted: Adapted = "not"
    checks: int = 0
    failures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether all is as it should be: it passes but for what is pinned, or is known to be unbuildable."""
        known = self.outcome == "not built" and why_unbuildable(self.model_type) is not None
        return known or self.outcome in ("passes", "pinned")


@dataclass(frozen=True)
class Zoo:
    """What came of the model types.

    Attributes:
        transformers: The release of transformers.
        level: The level of verification.
        rows: What came of each model type.
        seconds: How long it took in all.
    """

    transformers: str
    level: Level
    rows: tuple[Row, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all is as it should be in every row."""
        return all(row.is_right for row in self.rows)

    def count(self, *outcomes: Outcome) -> int:
        """Returns how many model types had one of some outcomes."""
        return sum(row.outcome in outcomes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        return {**asdict(self), "passed": self.passed, "rows": [asdict(row) for row in self.rows]}


def check(model_type: str, level: Level = "full") -> Row:
    """Builds, boots and verifies the tiny model of one model type.

    Args:
        model_type: One of `types()`.
        level: How much is verified, as in `TransformerBridge.verify`.

    Raises:
        InvalidArgumentError: transformers has no such model type, or there is no such level.

    Example:
        >>> import clearspan
        >>> row = clearspan.zoo.check("gpt2", "quick")
        >>> row.architecture, row.adapted, row.outcome
        ('GPT2LMHeadModel', 'by hand', 'passes')
    """
    _check_level(level)
    start = time.perf_counter()
    row = _verified(Row(model_type, class_name(model_type), "passes"), level)
    return replace(row, seconds=time.perf_counter() - start)


def _verified(row: Row, level: Level) -> Row:
    """Returns a row with what came of its model type."""
    try:
        model = build(row.model_type)
    except UnbuildableError as error:
        return replace(row, outcome="not built", reason=error.reason or str(error))
    try:
        with quiet():  # what boot warns of, verify says again as a check
            bridge = boot(model)
            found = bridge.verify(level, progress=False)
            parts = parts_of(bridge)
    except UnsupportedArchitectureError as error:
        return replace(row, outcome="unsupported", reason=str(error))
    except (ClearspanError, *FAULTS) as error:
        said = str(error) if isinstance(error, ClearspanError) else f"{type(error).__name__}: {error}"
        return replace(row, outcome="fails", reason=said)
    adapted: Adapted = "by hand" if row.architecture in ADAPTERS else "by structure"
    judged = _judged(row, tuple(pins_of(row.model_type)), found)
    return replace(judged, adapted=adapted, checks=len(found.checks), parts=parts)


def check_all(
    model_types: Iterable[str] | None = None,
    level: Level = "full",
    *,
    processes: int | None = None,
    progress: bool | Progress = True,
) -> Zoo:
    """Builds, boots and verifies the tiny models of model types.

    Args:
        model_types: Which of `types()`; by default all.
        level: How much is verified, as in `TransformerBridge.verify`.
        processes: How many processes share the work, each with one thread; by default as many as there are CPUs.
        progress: True shows a bar on a terminal, False shows nothing, and a function is called as
            `progress(stage, done, total)`.

    Returns:
        A row for each model type, in their order.

    Raises:
        InvalidArgumentError: transformers has no such model type, there is no such level, or `processes` is below 1.
    """
    import transformers

    start = time.perf_counter()
    wanted = types() if model_types is None else tuple(dict.fromkeys(model_types))
    for model_type in wanted:
        class_name(model_type)
    _check_level(level)
    count = os.cpu_count() or 1 if processes is None else processes
    if count < 1:
        raise InvalidArgumentError(f"processes={count} do nothing", expected="at least 1, or None")
    with shown(progress) as tell:
        rows = _checked(wanted, level, min(count, len(wanted)), tell)
    return Zoo(
        transformers=transformers.__version__,
        level=level,
        rows=tuple(rows[model_type] for model_type in wanted),
        seconds=time.perf_counter() - start,
    )


def _checked(wanted: tuple[str, ...], level: Level, processes: int, tell: Progress) -> dict[str, Row]:
    """Returns a row for each model type. A process that is done with one takes the next."""
    rows: dict[str, Row] = {}
    if processes <= 1:
        for model_type in wanted:
            rows[model_type] = check(model_type, level)
            tell(model_type, len(rows), len(wanted))
        return rows
    # Processes of their own, not copies of this one: torch's threads do not live through a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending: dict[Future[Row], str] = {pool.submit(check, one, level): one for one in wanted}
        try:
            for future in as_completed(pending):
                rows[pending[future]] = _row_of(future, pending[future])
                tell(pending[future], len(rows), len(wanted))
        finally:
            pool.shutdown(cancel_futures=True)
    return rows


def _row_of(future: Future[Row], model_type: str) -> Row:
    """Returns what a process made of a model type; what it raised is what came of it.

    The user's own interrupt is no result, and ends the work.
    """
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    return Row(model_type, class_name(model_type), "fails", reason=f"{type(error).__name__}: {error}")


def _check_level(level: str) -> None:
    if level not in ("quick", "full"):
        raise InvalidArgumentError(f"unknown level {level!r}", expected="'quick' or 'full'")


def _judged(row: Row, pins: tuple[Pin, ...], found: Verification) -> Row:
    """Returns a row with what the failing checks, and the pins for them, come to."""
    pinned: dict[str, str] = {}
    failures: dict[str, tuple[str, ...]] = {}
    for one in found.failures:
        pin = next((pin for pin in pins if pin.covers(one)), None)
        if pin is None:
            failures[one.group] = (*failures.get(one.group, ()), _said(one))
        else:
            pinned[_said(one)] = pin.reason
    idle = [pin for pin in pins if not any(pin.covers(one) for one in found.failures)]
    reason = "; ".join(f"the pin of {pin.what!r} holds nothing: take it out of clearspan/zoo/pins.py" for pin in idle)
    outcome: Outcome = "fails" if failures or idle else "pinned" if pinned else "passes"
    return replace(row, outcome=outcome, failures=failures, pinned=pinned, reason=reason)


def _said(one: Check) -> str:
    return one.what if one.error is None else f"{one.what} (error {one.error:.1e})"
