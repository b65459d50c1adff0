"""Runs the same lines of code in clearspan and in TransformerLens, for each name that the docs call the same.

    python benchmarks/peers/compare_names.py [--keep] [--seed N] [--draws N]

The lines are in `names.py`. Each is run on tiny random models, on raw and on processed weights, and what it returns is
compared: values, shapes, dtypes, text. So are the parameters and defaults of methods. `names_explanations.py` says why
a name differs where it does. The script exits with 1 if a difference has no explanation, or an explanation no
difference. With `--keep` it writes what it found to docs/names.json, of which docs/names.py makes the tables in
docs/coming-from-transformerlens.md. README.md says what environment it needs.
"""

import argparse
import contextlib
import importlib.metadata
import inspect
import io
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import names
import torch
import transformer_lens  # pyright: ignore[reportMissingImports]
import transformer_lens.patching  # pyright: ignore[reportMissingImports]
import transformers
from names_explanations import EXPLANATIONS, Explanation
from rich.console import Console
from tiny_models import MODELS, relative_error, save
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
from transformer_lens.utilities import get_act_name  # pyright: ignore[reportMissingImports]

import clearspan
from clearspan import patching

KEPT = Path(__file__).parents[2] / "docs/names.json"
PROCESSING = "Steps of weight processing, each alone"
PARAMETERS = "Parameters and defaults"
TOLERANCE = 2e-5
"""Of the largest difference over the largest value. Projections, which cancel, differ by 5.3e-6, as measured."""
LOOSE = 1e-3
"""The tolerance of singular values and eigenvalues, whose algorithms differ, and of what half precision goes into."""


@dataclass(frozen=True)
class Side:
    """One library with one model: what its lines of code may name."""

    words: Mapping[str, object]

    @classmethod
    def of(cls, bridge: Any, library: ModuleType, patch: ModuleType) -> "Side":
        """Returns a library's side, with the caches that its lines read."""
        own = {
            "is_ours": library is clearspan,
            "library": library,
            "bridge": bridge,
            "cache": bridge.run_with_cache(names.TOKENS)[1],
            "row": bridge.run_with_cache(names.TOKENS[:1], remove_batch_dim=True)[1],
            "ActivationCache": library.ActivationCache,
            "FactoredMatrix": library.FactoredMatrix,
            "get_act_name": clearspan.get_act_name if library is clearspan else get_act_name,
            "patching": patch,
        }
        return cls({**names.WORDS, **own})

    def run(self, line: str) -> object:
        """Returns what a line of code gives, or the error that it raises.

        Of a line `ours ~ theirs`, the part is run that is this library's.
        """
        own, _, other = line.partition(" ~ ")
        line = own if not other or self.words["is_ours"] else other
        quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        with torch.no_grad(), warnings.catch_warnings(), quiet[0], quiet[1]:
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                return eval(line, dict(self.words))
            except Exception as error:  # noqa: BLE001 (whatever a library raises is what is compared)
                return error


def sides(folder: str, steps: Mapping[str, bool] | None) -> tuple[Side, Side]:
    """Returns both libraries with the model in a folder.

    Args:
        folder: The model's.
        steps: The steps of weight processing, beside the default ones; None for raw weights.
    """
    ours, theirs = clearspan.boot(folder), TransformerBridge.boot_transformers(folder, device="cpu")
    if steps is not None:
        ours = ours.processed(**steps)
        with contextlib.redirect_stdout(io.StringIO()):
            theirs.enable_compatibility_mode(disable_warnings=True, **steps)
    return Side.of(ours, clearspan, patching), Side.of(theirs, transformer_lens, transformer_lens.patching)


@dataclass(frozen=True)
class Found:
    """What one line gave in both libraries.

    Attributes:
        name: What the page calls it.
        label: The model, its weights, and the line: what explanations are matched with.
        line: The line.
        difference: How the results differ, or None.
        error: The largest relative error of numbers that are equal.
        raised: Whether both raised.
    """

    name: str
    label: str
    line: str
    difference: str | None
    error: float
    raised: bool = False


@dataclass
class Comparison:
    """Compares two results.

    Attributes:
        tolerance: For relative errors.
        error: The largest relative error that was within it.
        raised: Whether both results are errors.
    """

    tolerance: float
    error: float = 0.0
    raised: bool = False

    def difference(self, ours: Any, theirs: Any) -> str | None:
        """Returns how two results differ, or None."""
        if isinstance(ours, Exception) and isinstance(theirs, Exception):
            self.raised = True
            return None
        if isinstance(ours, Exception) or isinstance(theirs, Exception):
            return f"{_shown(ours)} here, {_shown(theirs)} there"
        if _is_matrix(ours) and _is_matrix(theirs):
            return self.difference([ours.shape, ours.AB], [theirs.shape, theirs.AB])
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            return self._of_tensors(ours, theirs)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            if sorted(ours) != sorted(theirs):
                return f"{sorted(ours)} here, {sorted(theirs)} there"
            return self.difference([ours[key] for key in sorted(ours)], [theirs[key] for key in sorted(ours)])
        if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
            if len(ours) != len(theirs):
                return f"{len(ours)} here, {len(theirs)} there"
            found = (self.difference(a, b) for a, b in zip(ours, theirs, strict=True))
            return next((one for one in found if one is not None), None)
        return None if type(ours) is type(theirs) and ours == theirs else f"{_shown(ours)} here, {_shown(theirs)} there"

    def _of_tensors(self, ours: Tensor, theirs: Tensor) -> str | None:
        if ours.shape != theirs.shape:
            return f"{list(ours.shape)} here, {list(theirs.shape)} there"
        if ours.dtype != theirs.dtype:
            return f"{ours.dtype} here, {theirs.dtype} there"
        error = relative_error(ours.detach(), theirs.detach())
        if error > self.tolerance:
            gap, size = (ours.double() - theirs.double()).abs().max().item(), theirs.double().abs().max().item()
            return f"differs by {gap:.2g} in values up to {size:.2g}"
        self.error = max(self.error, error)
        return None


def _is_matrix(value: object) -> bool:
    return type(value).__name__ == "FactoredMatrix"


def _shown(value: object) -> str:
    if isinstance(value, Exception):
        return type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
        return f"{len(value)} values"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def signature_difference(ours: Any, theirs: Any) -> str | None:
    """Returns how the parameters and defaults of two functions differ; further parameters of ours are no difference."""
    own, other = (inspect.signature(function).parameters for function in (ours, theirs))
    further = inspect.signature(clearspan.TransformerBridge.forward).parameters if "forward_kwargs" in own else {}
    found = []
    positional = [name for name, one in own.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    for place, (name, parameter) in enumerate(other.items()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name not in own and name in further:
            continue
        if name not in own:
            found.append(f"`{name}` there alone")
            continue
        if place < len(positional) and parameter.kind is not parameter.KEYWORD_ONLY and positional[place] != name:
            found.append(f"`{name}` at another place")
        a, b = own[name].default, parameter.default
        if not (a == b or b is parameter.empty or {repr(a), repr(b)} == {"()", "[]"}):
            found.append(f"`{name}` is {_default(a)} here, {_default(b)} there")
    return ", ".join(found) or None


def _default(value: object) -> str:
    return "required" if value is inspect.Parameter.empty else repr(value)


def compared_signatures(ours: Side, theirs: Side) -> Iterator[Found]:
    """Yields the methods with how their parameters differ."""
    for where, methods in names.SIGNATURES.items():
        for method in methods.split():
            own, other = (getattr(side.words[where], method) for side in (ours, theirs))
            difference = signature_difference(own, other)
            line = f"{where}.{method}(...)"
            yield Found(line, f"signature: {line}", line, difference, 0.0)


def compared(label: str, ours: Side, theirs: Side, lines: Sequence[tuple[str, str]]) -> Iterator[Found]:
    """Yields what each line gives in both libraries."""
    for name, line in lines:
        loose = re.search(r"svd|eigen|\.S\b|\.U\b|\.V|make_even|collapse|bfloat16", line)
        comparison = Comparison(LOOSE if loose else TOLERANCE)
        difference = comparison.difference(ours.run(line), theirs.run(line))
        yield Found(name, f"{label}: {line}", line, difference, comparison.error, comparison.raised)


def runs(model: str, folder: str, seed: int, draws: int) -> Iterator[tuple[str, Found]]:
    """Yields what each line gave on a model in a folder, with the section that it is of."""
    for label, steps in (("raw", None), ("processed", {})):
        ours, theirs = sides(folder, steps)
        drawn = list(names.drawn(seed, draws))
        for section, rows in names.NAMES.items():
            lines = [(name, line) for name, its in rows.items() for line in its]
            lines += [one for one in drawn if one[0] in rows]
            for found in compared(f"{model}, {label}", ours, theirs, lines):
                yield section, found
    for found in compared_signatures(ours, theirs):
        yield PARAMETERS, found
    for step in names.STEPS:
        for found in compared_step(model, folder, step):
            yield PROCESSING, found


def compared_step(model: str, folder: str, step: str) -> Iterator[Found]:
    """Yields how weights and probabilities differ after one step of processing."""
    steps = {one: one == step for one in names.STEPS}
    try:
        ours, theirs = sides(folder, steps)
    except Exception as error:  # noqa: BLE001 (whatever a library raises is what is compared)
        line = f"{step}=True"
        where = "here" if isinstance(error, clearspan.errors.ClearspanError) else "there"
        yield Found(step, f"{model}, step: {line}", line, f"{type(error).__name__} {where}", 0.0)
        return
    lines = names.PRODUCTS if step == "refactor_factored_attn_matrices" else names.WEIGHTS
    yield from compared(f"{model}, step {step}", ours, theirs, [(step, line) for line in lines])


def explanation_of(found: Found) -> Explanation | None:
    """Returns the first explanation that is for a difference."""
    text = f"{found.label}: {found.difference}"
    return next((one for one in EXPLANATIONS if re.search(one.of, text)), None)


@dataclass
class Row:
    """What was found of one name.

    Attributes:
        lines: How many lines were run, on all models.
        same: How many of them gave the same, or raised in both.
        raised: How many raised in both.
        error: The largest relative error of these.
        differences: By explanation's text: how many lines, and one of them with its numbers.
    """

    lines: int = 0
    same: int = 0
    raised: int = 0
    error: float = 0.0
    differences: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, found: Found, explanation: Explanation | None) -> None:
        """Counts one line."""
        self.lines += 1
        if found.difference is None:
            self.same += 1
            self.raised += found.raised
            self.error = max(self.error, found.error)
            return
        text = "not explained" if explanation is None else explanation.text
        there = self.differences.setdefault(
            text, {"count": 0, "line": found.line, "how": found.difference, "label": found.label}
        )
        there["count"] += 1


def parsed() -> argparse.Namespace:
    """Returns the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keep", action="store_true", help="write docs/names.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=100, help="random calls of the cache's methods on each model")
    return parser.parse_args()


def main() -> int:
    """Prints what was found of each name, and returns the exit code."""
    arguments = parsed()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    console = Console(width=160, highlight=False)
    sections: dict[str, dict[str, Row]] = {section: {} for section in (*names.NAMES, PROCESSING, PARAMETERS)}
    used: set[Explanation] = set()
    unexplained: list[Found] = []
    for number, (model, make_config) in enumerate(MODELS.items()):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save(make_config(), folder)
            for section, found in runs(model, folder, arguments.seed + number, arguments.draws):
                explanation = None if found.difference is None else explanation_of(found)
                if found.difference is not None and explanation is None:
                    unexplained.append(found)
                if explanation is not None:
                    used.add(explanation)
                if section == PARAMETERS and number:  # the same for every model
                    continue
                sections[section].setdefault(found.name, Row()).add(found, explanation)
    unused = [one for one in EXPLANATIONS if one not in used]
    for section, rows in sections.items():
        same, lines = sum(row.same for row in rows.values()), sum(row.lines for row in rows.values())
        console.print(f"{section}: {same} of {lines} lines the same", markup=False)
        for name, row in rows.items():
            more = "".join(f"; {text[:60]} ({there['count']})" for text, there in row.differences.items())
            console.print(
                f"  {name}: {row.same} of {row.lines}, {row.raised} raise in both, error {row.error:.1e}{more}",
                markup=False,
            )
    for one in unexplained:
        console.print(f"NOT EXPLAINED {one.label}: {one.difference}", markup=False, soft_wrap=True)
    for one in unused:
        console.print(f"explains no difference: {one.of}", markup=False)
    if arguments.keep:
        KEPT.write_text(kept(sections))
    return 1 if unexplained or unused else 0


def kept(sections: Mapping[str, Mapping[str, Row]]) -> str:
    """Returns the text of docs/names.json."""
    result = {
        "transformer_lens": importlib.metadata.version("transformer-lens"),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "models": list(MODELS),
        "sections": {section: {name: vars(row) for name, row in rows.items()} for section, rows in sections.items()},
    }
    return json.dumps(result, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
