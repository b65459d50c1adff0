"""Compares every cached value of clearspan with TransformerLens's value of that name.

    python benchmarks/peers/compare_transformer_lens.py

Tiny random models are saved to a temporary folder, and both libraries load them from there: TransformerLens by
`TransformerBridge.boot_transformers`, without processing of weights and without compatibility mode. Each model runs on
two rows of one length, on a left-padded batch, and on that batch with clearspan's model set to eager attention.

A name that is not equal in both is a difference, and `explanations.py` says why it is there. Where an explanation
claims that the value is found under another name, the numbers are compared with those. The script exits with 1 if a
difference has no explanation, or an explanation no difference. README.md says what environment it needs.
"""

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import transformers
from explanations import EXPLANATIONS, Explanation, Kind
from rich.console import Console
from rich.table import Table
from tiny_models import MODELS, TOLERANCE, relative_error, save
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

import clearspan

SWITCHES = ("set_use_attn_result", "set_use_hook_mlp_in", "set_use_split_qkv_input", "set_use_attn_in")
"""Without these TransformerLens does not compute some values. Each is turned on for a run of its own."""


@dataclass(frozen=True)
class Run:
    """One way to run both libraries."""

    label: str
    is_padded: bool
    kernel: Literal["sdpa", "eager"]


RUNS = (Run("one length", False, "sdpa"), Run("padded", True, "sdpa"), Run("padded, eager", True, "eager"))


@dataclass(frozen=True)
class Difference:
    """One name that is not equal. `error` is that of its numbers in one layout, None where nothing is compared."""

    name: str
    kind: Kind
    run: str
    shapes: str
    error: float | None
    explanation: Explanation | None

    @property
    def is_explained(self) -> bool:
        """Whether there is an explanation, and the numbers are those of the other name that it gives."""
        same_as = self.explanation and self.explanation.same_as
        return self.explanation is not None and (not same_as or (self.error or 0) <= TOLERANCE)


@dataclass(frozen=True)
class Outcome:
    """What one run of one model gave: its differences, and the errors of the values that are equal."""

    differences: list[Difference]
    n_names: int
    equal: list[float]


def inputs(run: Run) -> tuple[Tensor, Tensor]:
    """Returns tokens and attention mask; where padded, the second row starts with four pads."""
    tokens = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if run.is_padded:
        tokens[1, :4] = 0
        mask[1, :4] = 0
    return tokens, mask


def clearspan_values(folder: str, run: Run) -> dict[str, Tensor]:
    """Returns every cached value of clearspan, under every name, aliases too."""
    tokens, mask = inputs(run)
    bridge = clearspan.boot(folder, attn_implementation=run.kernel)
    _, cache = bridge.run_with_cache(tokens, attention_mask=mask if run.is_padded else None)
    return {name: cache[name] for name in bridge.hook_dict}


def transformer_lens_values(folder: str, run: Run) -> tuple[dict[str, Tensor], set[str]]:
    """Returns every cached value of TransformerLens, and the names that are there only with a switch on."""
    tokens, mask = inputs(run)
    bridge = TransformerBridge.boot_transformers(folder, device="cpu")

    def cached() -> dict[str, Tensor]:
        _, cache = bridge.run_with_cache(tokens, attention_mask=mask if run.is_padded else None)
        return dict(cache.cache_dict)

    values = cached()
    by_default = set(values)
    for switch in SWITCHES:
        getattr(bridge, switch)(True)
        values = {**cached(), **values}
        getattr(bridge, switch)(False)
    return values, set(values) - by_default


def in_one_layout(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns both in one shape: heads joined or apart, or one slice repeated for several; None if that cannot be."""
    if ours.numel() == theirs.numel():
        return ours, theirs.reshape(ours.shape)
    if ours.ndim != theirs.ndim:
        return None
    pair = [ours, theirs]
    for axis, sizes in enumerate(zip(ours.shape, theirs.shape, strict=True)):
        if max(sizes) % min(sizes):
            return None
        pair = [part.repeat_interleave(max(sizes) // size, axis) for part, size in zip(pair, sizes, strict=True)]
    return pair[0], pair[1]


def error_that_counts(name: str, pair: tuple[Tensor, Tensor], run: Run) -> float:
    """Returns the relative error, under a fused kernel at the positions alone that are no padding."""
    if run.kernel == "eager":
        return relative_error(*pair)
    axis = 2 if name.endswith(("hook_attn_scores", "hook_pattern")) else 1  # of positions, or of queries
    is_real = inputs(run)[1].bool()
    ours, theirs = (value.movedim(axis, 1)[is_real] for value in pair)
    return relative_error(ours, theirs)


def explanation_of(name: str, kind: Kind) -> Explanation | None:
    """Returns the first explanation that is for this kind of difference and this name."""
    fitting = (entry for entry in EXPLANATIONS if entry.kind == kind and re.fullmatch(entry.names, name))
    return next(fitting, None)


def only_in_one(name: str, kind: Kind, value: Tensor, others: Mapping[str, Tensor], run: Run) -> Difference:
    """Returns the difference of a name that one library lacks, compared with the name that its explanation gives."""
    explanation = explanation_of(name, kind)
    error = None
    if explanation is not None and explanation.same_as is not None:
        other = others.get(re.sub(explanation.names, explanation.same_as, name))
        pair = None if other is None else in_one_layout(value, other)
        error = torch.inf if pair is None else error_that_counts(name, pair, run)
    return Difference(name, kind, run.label, str(list(value.shape)), error, explanation)


def in_both(name: str, ours: Tensor, theirs: Tensor, run: Run, is_switched: bool) -> list[Difference]:
    """Returns the ways in which two values of one name differ.

    A difference at padding alone has the error everywhere; others have, under a fused kernel, the error elsewhere.
    """
    pair = in_one_layout(ours, theirs)
    error = torch.inf if pair is None else relative_error(*pair)
    counts = torch.inf if pair is None else error_that_counts(name, pair, run)
    found: dict[Kind, bool] = {
        "value": counts > TOLERANCE,
        "padding": error > TOLERANCE >= counts,
        "shape": ours.shape != theirs.shape,
        "dtype": ours.dtype != theirs.dtype,
        "switch": is_switched,
    }
    shapes = " and ".join(dict.fromkeys(str(list(value.shape)) for value in (ours, theirs)))
    return [
        Difference(name, kind, run.label, shapes, error if kind == "padding" else counts, explanation_of(name, kind))
        for kind, is_so in found.items()
        if is_so
    ]


def compare(folder: str, run: Run) -> Outcome:
    """Returns how the two libraries differ on the model in a folder."""
    ours = clearspan_values(folder, run)
    theirs, switched = transformer_lens_values(folder, run)
    found = [only_in_one(name, "only clearspan", ours[name], theirs, run) for name in ours if name not in theirs]
    found += [only_in_one(name, "only TransformerLens", theirs[name], ours, run) for name in theirs if name not in ours]
    equal: list[float] = []
    for name in ours:
        if name in theirs:
            differences = in_both(name, ours[name], theirs[name], run, name in switched)
            found += differences
            equal += [] if differences else [relative_error(ours[name], theirs[name])]
    return Outcome(found, len(ours.keys() | theirs.keys()), equal)


def summary(model: str, outcomes: Mapping[str, Outcome]) -> Table:
    """Returns the table of one model: how many names are equal in each run, and how the others differ."""
    table = Table(title=model, title_justify="left")
    for column in ("run", "names", "equal", "largest error", *get_args(Kind), "unexplained"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for label, outcome in outcomes.items():
        kinds = [difference.kind for difference in outcome.differences]
        counts = [str(kinds.count(kind)) for kind in get_args(Kind)]
        unexplained = sum(not difference.is_explained for difference in outcome.differences)
        largest = f"{max(outcome.equal):.1e}"
        table.add_row(label, str(outcome.n_names), str(len(outcome.equal)), largest, *counts, str(unexplained))
    return table


def listing(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Gives the lines that list every difference under its explanation, with all layers of a name in one line."""
    found: dict[Explanation | None, dict[tuple[Kind, str, str], list[Difference]]] = {}
    for difference in (each for outcome in outcomes.values() for each in outcome.differences):
        explanation = difference.explanation if difference.is_explained else None
        key = (difference.kind, re.sub(r"blocks\.\d+", "blocks.{l}", difference.name), difference.shapes)
        found.setdefault(explanation, {}).setdefault(key, []).append(difference)
    for explanation, names in found.items():
        yield "\nNOT EXPLAINED" if explanation is None else f"\n{explanation.kind}: {explanation.text}"
        for (kind, name, shapes), group in sorted(names.items()):
            errors = [difference.error for difference in group if difference.error is not None]
            numbers = f"largest error {max(errors):.1e}" if errors else "not compared"
            runs = "; ".join(dict.fromkeys(difference.run for difference in group))
            yield f"  {name}  {shapes}  {numbers}  ({runs})" + (f"  {kind}" if explanation is None else "")


def main() -> int:
    """Prints a table and a list for each model, and returns the exit code."""
    transformers.logging.disable_progress_bar()
    console = Console(width=160, highlight=False)
    used: set[Explanation | None] = set()
    is_explained = True
    for model, make_config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save(make_config(), folder)
            outcomes = {run.label: compare(folder, run) for run in RUNS}
        console.print(summary(model, outcomes))
        for line in listing(outcomes):
            console.print(line, markup=False, soft_wrap=True)
        console.print()
        found = [difference for outcome in outcomes.values() for difference in outcome.differences]
        used |= {difference.explanation for difference in found}
        is_explained &= all(difference.is_explained for difference in found)
    unused = [explanation for explanation in EXPLANATIONS if explanation not in used]
    for explanation in unused:
        console.print(f"explains no difference: {explanation.kind} {explanation.names}", markup=False)
    return 0 if is_explained and not unused else 1


if __name__ == "__main__":
    sys.exit(main())
