"""Which functions may be hooks: whatever can be called with a value and a point, whatever it calls them."""

import functools

import pytest
import torch
from torch import nn

from clearspan.errors import HookTypeError
from clearspan.points import HookPoint, Place, Side


@pytest.fixture
def point() -> HookPoint:
    return HookPoint("blocks.0.attn.hook_q", ("batch",), Place("attn", Side.OUTPUT))


def plus(value, point, amount):
    assert isinstance(point, HookPoint)
    return value + amount


def two(value, point):
    return plus(value, point, 1)


def only_positional(value, point, /):
    return plus(value, point, 1)


def by_name(value, *, hook):
    return plus(value, hook, 1)


def keywords(value, **given):
    return plus(value, given["hook"], 1)


def everything(*args, **given):
    return plus(*args, given["hook"], 1)


def arguments(*args):
    return plus(*args, 1)


def rest(value, *others):
    return plus(value, *others, 1)


def hook_comes_first(hook, point):
    return plus(hook, point, 1)


def default_after(value, point, amount=1):
    return plus(value, point, amount)


def default_before(value, amount=1, hook=None):
    return plus(value, hook, amount)


def default_hook(value, hook=None):
    return plus(value, hook, 1)


@functools.wraps(two)
def wrapped(*args, **given):
    return two(*args, **given)


class Adder:
    def __call__(self, value, point):
        return plus(value, point, 1)

    def method(self, value, point):
        return plus(value, point, 1)

    @classmethod
    def of_class(cls, value, point):
        return plus(value, point, 1)

    @staticmethod
    def static(value, point):
        return plus(value, point, 1)


class AdderByName:
    def __call__(self, value, *, hook):
        return plus(value, hook, 1)


class Module(nn.Module):
    def forward(self, value, point):
        return plus(value, point, 1)


class OneInput(nn.Module):
    def forward(self, value):
        return value


FUNCTIONS = [
    two, only_positional, by_name, keywords, everything, arguments, rest, hook_comes_first, default_after,
    default_before, default_hook, wrapped, lambda value, where: plus(value, where, 1), Adder(), Adder().method,
    Adder.of_class, Adder.static, AdderByName(), Module(), functools.partial(plus, amount=1),
    functools.partial(lambda amount, value, point: plus(value, point, amount), 1),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: getattr(one, "__name__", type(one).__name__))
def test_the_second_parameter_may_have_any_name(point, function):
    point.add_hook(function)
    assert point.offer(torch.zeros(1))[0].item() == 1
    point.remove_hooks()
    point.add_hook(function, "bwd")
    (call,) = point.backward_calls()
    assert call(torch.zeros(1)).item() == 1


WRONG = {
    "<lambda>(value)": lambda value: value,
    "<lambda>()": lambda: None,
    "<lambda>(value, layer=3)": lambda value, layer=3: value,
    "plus(value, point, amount)": plus,
    "<lambda>(value, *, layer)": lambda value, *, layer: value,
    "<lambda>(*, value, hook)": lambda *, value, hook: value,
    "append(object, /)": [].append,
    "OneInput(value)": OneInput(),
    "relu, whose parameters are not known": torch.relu,
}


@pytest.mark.parametrize("shown", WRONG)
def test_other_parameters_are_refused_before_the_run(point, shown):
    with pytest.raises(HookTypeError) as error:
        point.add_hook(WRONG[shown])
    assert str(error.value).splitlines() == [
        "a hook function takes two things: a value and its hook point",
        "  expected: fn(value, hook)",
        f"  got: {shown}",
        "  where: blocks.0.attn.hook_q",
        "  fix: lambda value, hook: ...",
    ]
    assert not point.is_listening


def test_in_runs(bridge, tokens):
    base = bridge(tokens)
    name = "blocks.1.attn.hook_z"

    def zero(value, at):
        assert at.name == name
        value.zero_()

    named = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))])
    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[(name, zero)]), named)
    assert not torch.equal(named, base)
    with pytest.raises(HookTypeError, match="takes two things"):
        bridge.run_with_hooks(tokens, fwd_hooks=[(name, zero), (name, lambda value: value)])
    assert torch.equal(bridge(tokens), base)
