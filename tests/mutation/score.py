"""How many wrong adapters `verify` catches: `python -m tests.mutation.score [--every N] [variant ...]`."""

import argparse
import contextlib
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

import clearspan
from clearspan import TransformerBridge
from clearspan.architectures import ADAPTERS
from clearspan.errors import ClearspanError
from clearspan.hf.loading import bridge_config
from clearspan.verification import Check
from clearspan.verification.run import checks, trial_of
from tests import zoo
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.numbers import first_difference, numbers


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant.

    Attributes:
        variant: The model of the zoo.
        mutant: What was changed.
        fate: `"boot"`, `"verify"`: caught there; `"equal"`: no number is another; `"survivor"`; `"traceback"`.
        why: The first failed check, the error, or the number that is another.
    """

    variant: str
    mutant: str
    fate: str
    why: str = ""


def verdicts(variant: str, *, whole: bool = False, every: int = 1, first: int = 0) -> Iterator[Verdict]:
    """Yields the verdict on mutants of a variant's adapter.

    Args:
        variant: The model of the zoo.
        whole: Whether a verification goes on after its first failed check.
        every: Takes one mutant of so many.
        first: Number of the first one taken.
    """
    model = zoo.build(variant)
    right = ADAPTERS[type(model).__name__]
    expected: dict[str, object] = {}
    for mutant in itertools.islice(mutants(right, model), first, None, every):
        fate, why, bridge = _caught(model, mutant, whole=whole)
        if fate == "passed":
            assert bridge is not None, "it was booted"
            expected = expected or numbers(TransformerBridge(model, right(bridge_config(model, right))))
            other = first_difference(numbers(bridge), expected)
            fate, why = ("equal", "") if other is None else ("survivor", other)
        yield Verdict(variant, mutant.what, fate, why)


def _caught(model: PreTrainedModel, mutant: Mutant, *, whole: bool) -> tuple[str, str, TransformerBridge | None]:
    kind = type(model).__name__
    right = ADAPTERS[kind]
    try:
        ADAPTERS[kind] = mutant.adapter
        bridge = clearspan.boot(model)
    except ClearspanError as error:
        return "boot", str(error).splitlines()[0], None
    except Exception as error:  # noqa: BLE001 (what should never be is what is looked for)
        return "traceback", f"boot: {type(error).__name__}: {error}", None
    finally:
        ADAPTERS[kind] = right
    try:
        failed = _first_failure(bridge, whole=whole)
    except Exception as error:  # noqa: BLE001 (likewise)
        return "traceback", f"verify: {type(error).__name__}: {error}", bridge
    return ("passed", "", bridge) if failed is None else ("verify", f"{failed.group}: {failed.what}", bridge)


def _first_failure(bridge: TransformerBridge, *, whole: bool) -> Check | None:
    if whole:
        return next(iter(bridge.verify().failures), None)
    trial = trial_of(bridge, "quick", None)
    with contextlib.closing(checks(trial)) as made:
        return next((check for check in made if not check.passed), None)


def table(found: Iterable[Verdict]) -> str:
    """Returns the score by variant: how many mutants that change a number are caught."""
    by_variant: dict[str, Counter[str]] = {}
    for verdict in found:
        by_variant.setdefault(verdict.variant, Counter())[verdict.fate] += 1
    lines = [f"{'variant':26} {'mutants':>8} {'boot':>6} {'verify':>7} {'equal':>6} {'missed':>7} {'score':>7}"]
    for variant, fates in [*by_variant.items(), ("all", sum(by_variant.values(), Counter()))]:
        caught, missed = fates["boot"] + fates["verify"], fates["survivor"] + fates["traceback"]
        share = caught / max(1, caught + missed)
        lines.append(
            f"{variant:26} {sum(fates.values()):8} {fates['boot']:6} {fates['verify']:7} {fates['equal']:6} {missed:7} "
            f"{share:7.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints survivors as they are found, and the score."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--every", type=int, default=1, help="take one mutant of so many")
    parser.add_argument("--whole", action="store_true", help="go on with a verification after its first failed check")
    parser.add_argument("variants", nargs="*", help="models of the zoo; by default all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: list[Verdict] = []
    for variant in asked.variants or zoo.MODELS:
        start = time.time()
        own = list(verdicts(variant, every=asked.every, whole=asked.whole))
        found += own
        for verdict in own:
            if verdict.fate in ("survivor", "traceback"):
                print(f"{variant}: {verdict.mutant}: {verdict.fate}: {verdict.why}", flush=True)
        print(f"-- {variant}: {len(own)} mutants in {time.time() - start:.0f} s", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
