"""Wrong adapters are caught: each entry of every adapter dropped or changed, by program, a part of them in each run.

`make mutants` tries all, which takes an hour. `survivors.md` has those that are not caught, each with the reason.
"""

import fnmatch
import warnings
from pathlib import Path

import pytest

from clearspan.architectures import ADAPTERS
from tests import zoo
from tests.mutation.mutants import mutants
from tests.mutation.score import Verdict, table, verdicts

EVERY = 40
"""One mutant of so many is tried here."""


def survivors() -> dict[tuple[str, str], str]:
    """Returns the reasons of what is known not to be caught, by patterns of variant and mutant."""
    lines = (Path(__file__).parent / "survivors.md").read_text().splitlines()
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")
    ]
    return {(variant, mutant): reason for variant, mutant, reason in rows}


def is_known(verdict: Verdict) -> bool:
    return any(
        fnmatch.fnmatchcase(verdict.variant, variant) and fnmatch.fnmatchcase(verdict.mutant, mutant)
        for variant, mutant in survivors()
    )


def one_of_each_family() -> list[str]:
    """The first variant of each adapter."""
    found: dict[str, str] = {}
    for variant in zoo.MODELS:
        found.setdefault(type(zoo.build(variant)).__name__, variant)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("variant", one_of_each_family())
def test_wrong_adapters_are_caught(variant):
    first = sum(map(ord, variant)) % EVERY  # other entries in each family
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(verdicts(variant, every=EVERY, first=first))
    print(table(found))
    missed = [one for one in found if one.fate in ("survivor", "traceback") and not is_known(one)]
    assert not missed, missed
    assert any(one.fate in ("boot", "verify") for one in found)


def test_every_entry_of_an_adapter_has_a_mutant():
    """By kind of entry: what the generator makes of one adapter covers its paths, flags, layouts, norms and weights."""
    model = zoo.build("falcon grouped")
    made = [mutant.what for mutant in mutants(ADAPTERS["FalconForCausalLM"], model)]
    assert len(made) == len(set(made)), [what for what in made if made.count(what) > 1]
    for entry in (
        "cfg.final_rms: False to True",
        "blocks.{i}.attn.q.weight: no conversion",
        "blocks.ln1: a path that is not there",
        "blocks: is_parallel False",
        "blocks.attn: has_rotary False",
        "blocks.mlp.in: layout FLAT",
        "blocks.mlp: output_is_overwritten False",
        "blocks: attn and ln2 swapped",
        "blocks: no ln2",
        "the adapter of another family, LlamaArchitectureAdapter",
    ):
        assert entry in made, entry
    assert any("rule BlockedQKVConversionRule" in what for what in made)
