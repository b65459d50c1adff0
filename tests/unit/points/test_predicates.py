"""Predicates of names: whatever is remembered of their answers, they choose what they hold for at the call."""

import pytest
import torch
from tests.conftest import tiny_model

import clearspan

TOKENS = torch.tensor([[5, 9, 2]])
ending = "hook_z"


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot(tiny_model())


def leaves(bridge, predicate):
    """Returns the last parts of the names that a cache has."""
    _, cache = bridge.run_with_cache(TOKENS, predicate)
    return {name.rpartition(".")[2] for name in cache}


def ending_in(what):
    return lambda name: name.endswith(what)


def among(parts):
    return lambda name: any(name.endswith(part) for part in parts)


def by_default(name, what="hook_z"):
    return name.endswith(what)


def by_global(name):
    return name.endswith(ending)


def test_functions_of_one_code_differ_by_what_they_close_over(bridge):
    for what in ("hook_z", "hook_resid_pre", "hook_z"):
        assert leaves(bridge, ending_in(what)) == {what}
    for parts in (("hook_z",), ("hook_z", "hook_resid_pre")):
        assert leaves(bridge, among(parts)) == set(parts)


def test_a_list_that_a_function_reads_may_change(bridge):
    parts = ["hook_z"]
    predicate = among(parts)
    assert leaves(bridge, predicate) == {"hook_z"}
    parts.append("hook_resid_pre")
    assert leaves(bridge, predicate) == {"hook_z", "hook_resid_pre"}


def test_so_may_a_global_a_default_and_an_attribute(bridge, monkeypatch):
    class Chosen:
        what = "hook_z"

    def by_attribute(name):
        return name.endswith(Chosen.what)

    for predicate in (by_global, by_default, by_attribute):
        assert leaves(bridge, predicate) == {"hook_z"}
    monkeypatch.setitem(globals(), "ending", "hook_resid_pre")
    monkeypatch.setattr(by_default, "__defaults__", ("hook_resid_pre",))
    Chosen.what = "hook_resid_pre"
    for predicate in (by_global, by_default, by_attribute):
        assert leaves(bridge, predicate) == {"hook_resid_pre"}


def test_a_builtin_may_be_covered_by_a_global(bridge, monkeypatch):
    assert leaves(bridge, among(("hook_z",))) == {"hook_z"}
    monkeypatch.setitem(globals(), "any", lambda answers: name_is_long(list(answers)))
    with pytest.raises(NameError):
        leaves(bridge, among(("hook_z",)))


def test_true_is_not_one(bridge):
    def numbered(number):
        return lambda name: name.startswith("blocks.0.hook_resid" if str(number) == "1" else "blocks.0.attn.hook_z")

    assert leaves(bridge, numbered(True)) == {"hook_z"}
    assert leaves(bridge, numbered(1)) == {"hook_resid_pre", "hook_resid_mid", "hook_resid_post"}


def test_a_function_that_does_something_is_called_in_each_run(bridge):
    asked = 0

    def counting(name):
        nonlocal asked
        asked += 1
        return name.endswith("hook_z")

    leaves(bridge, counting)
    once = asked
    leaves(bridge, counting)
    assert asked == 2 * once > 0
