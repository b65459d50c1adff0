"""Names of TransformerLens's hook points."""

import pytest

from clearspan.errors import InvalidArgumentError


def nothing(value, hook):
    pass


def test_listeners_by_direction(bridge):
    point = bridge.hook_dict["blocks.0.hook_resid_post"]
    assert point.fwd_hooks == point.bwd_hooks == []
    assert not point.has_hooks()
    point.add_hook(nothing)
    point.add_perma_hook(nothing, "bwd")
    assert [one.function for one in point.fwd_hooks] == [nothing]
    assert [one.is_permanent for one in point.bwd_hooks] == [True]
    assert point.has_hooks()
    assert point.has_hooks("bwd")
    assert not point.has_hooks("bwd", including_permanent=False)
    point.remove_hooks()
    assert point.fwd_hooks == []
    point.remove_hooks("both")
    assert len(point.bwd_hooks) == 1
    point.remove_hooks("bwd", including_permanent=True)
    assert not point.has_hooks()


def test_by_default_hooks_of_values_alone_come_off(bridge):
    point = bridge.hook_dict["blocks.0.hook_resid_post"]
    point.add_hook(nothing)
    point.add_hook(nothing, "bwd")
    point.remove_hooks()
    assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (0, 1)


def test_hooks_have_no_levels(bridge):
    point = bridge.hook_dict["blocks.0.hook_resid_post"]
    for call in (point.has_hooks, point.remove_hooks):
        with pytest.raises(InvalidArgumentError, match=r"level=0: hooks have no levels\n  fix: with bridge\.hooks"):
            call(level=0)


def test_the_context_is_emptied(bridge):
    point = bridge.hook_dict["blocks.0.hook_resid_post"]
    point.ctx["kept"] = 1
    point.clear_context()
    assert point.ctx == {}
