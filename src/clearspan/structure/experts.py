"""The experts of a mixture: which of their weights read, which add, and whether some experts have none."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.components import ExpertsBridge
from clearspan.structure.algebra import same
from clearspan.structure.mlp import layout_of
from clearspan.structure.trace import Trace, Visit, fresh_arguments, traced

CHANNEL = 3
"""The one that is changed to see what reads it, and what gives it."""


@dataclass(frozen=True)
class Choice:
    """What experts are given beside their input.

    Attributes:
        weights: The argument's name and value with a weight of each expert that is chosen for a token.
        indices: The same with which experts these are.
    """

    weights: tuple[str, Tensor]
    indices: tuple[str, Tensor]

    @property
    def k(self) -> int:
        """How many experts are chosen for each token."""
        return self.indices[1].shape[-1]


def find_experts(trace: Trace, whole: Visit) -> Visit | None:
    """Returns the call of the experts in a mixture: what is told which are chosen, or holds the weights of several."""
    inside = trace.inside(whole)
    chosen = (one for one in inside if one.module._modules or any(True for _ in _weights(one)))
    told = next((one for one in chosen if choice_of(one) is not None), None)
    return told or next((one for one in inside if _holds_several(one)), None)


def _holds_several(visit: Visit) -> bool:
    """Whether a module holds the weights of several experts in one tensor."""
    return any(one is not None and one.ndim == 3 for one in visit.module._parameters.values())


def choice_of(experts: Visit) -> Choice | None:
    """Returns which experts a call is told to use, with which weights; None where it is not told."""
    parameters = list(inspect.signature(type(experts.module).forward).parameters)[1:]
    named = {**dict(zip(parameters, experts.args, strict=False)), **experts.kwargs}
    pairs = [(name, one) for name, one in named.items() if isinstance(one, Tensor) and one.ndim == 2]
    indices = next(((name, one) for name, one in pairs if not one.is_floating_point()), None)
    if indices is None:
        return None
    alike = [(name, one) for name, one in pairs if one.shape == indices[1].shape and one is not indices[1]]
    return Choice(alike[0], indices) if alike else None


def experts_template(whole: Visit, experts: Visit, d_model: int) -> ExpertsBridge | None:
    """Returns the template of all experts, or None where it is not clear which of their weights read, and which add.

    Args:
        whole: The call of the mixture.
        experts: The call of the experts.
        d_model: The residual stream's width.
    """
    assert experts.entered is not None, "experts take a tensor"
    width = experts.entered.shape[-1]
    roles = {name: _role(experts, weight, width) for name, weight in _weights(experts)}
    reading = {name: axis for name, (reads, axis) in roles.items() if reads}
    adding = {name: axis for name, (reads, axis) in roles.items() if not reads and axis}
    if not reading or len(adding) != 1 or len(set(reading.values())) > 1 or any(not axis for _, axis in roles.values()):
        return None
    (added, out_axis), in_axis = next(iter(adding.items())), next(iter(reading.values()))
    is_transposed, is_other = in_axis == -2, (out_axis == -1) != (in_axis == -2)
    n_tokens = experts.entered.numel() // width
    given = 0 if whole.entered is None else whole.entered.numel() // d_model
    has_ends = experts.left is not None and experts.left.numel() == n_tokens * width and n_tokens == given
    return ExpertsBridge(
        experts.path.removeprefix(f"{whole.path}."),
        is_transposed=is_transposed,
        reading=tuple(reading),
        adding=added,
        adding_is_transposed=(out_axis == -1) if is_other else None,
        has_ends=has_ends,
        is_narrow=width != d_model,
        layout=layout_of(experts.entered),
    )


def _weights(experts: Visit) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of several experts; where none has an axis for them, those that hold experts one by one."""
    named = [(name, one) for name, one in experts.module.named_parameters() if one.is_floating_point()]
    most = max((one.ndim for _, one in named), default=0)
    yield from ((name, one) for name, one in named if one.ndim == most > 1)


def _role(experts: Visit, weight: Tensor, width: int) -> tuple[bool, int]:
    """Returns whether a weight reads the input, or else adds to the output; and by which axis, 0 where by none."""
    axes = [axis for axis in (-1, -2) if weight.shape[axis] == width]
    assert experts.entered is not None, "experts take a tensor"
    without = experts.entered.clone()
    without[..., CHANNEL] = 0
    plain, blind = (_output(experts, value) for value in (experts.entered, without))
    for axis in axes:
        with _changed(weight, axis):
            moved, unmoved = (_output(experts, value) for value in (experts.entered, without))
        if same(unmoved, blind) and not same(moved, plain):
            return True, axis
        change = (moved - plain).abs().flatten(0, -2).amax(0)
        if bool(change[CHANNEL] > 0) and int((change > 0).sum()) == 1:
            return False, axis
    return False, 0


def _output(experts: Visit, value: Tensor) -> Tensor:
    args, kwargs = fresh_arguments(experts, value.clone())
    left = traced(experts.module, lambda: experts.module(*args, **kwargs)).visits[0].left
    assert left is not None, "experts give a tensor"
    return left


@contextlib.contextmanager
def _changed(weight: Tensor, axis: int) -> Iterator[None]:
    """While the context is open, one channel of a weight's axis is another."""
    own, before = weight.detach(), weight.detach().clone()
    channel = own.select(axis, CHANNEL)
    channel.copy_(channel * 1.5 + 0.1)
    try:
        yield
    finally:
        own.copy_(before)


def has_identities(experts: Visit, n_chosen_from: int) -> bool | None:
    """Returns whether the experts that have no weights return their input; None where they do something else.

    Args:
        experts: The call of the experts.
        n_chosen_from: How many experts the router chooses from.
    """
    choice = choice_of(experts)
    owned = min((len(one) for _, one in _weights(experts) if one.ndim == 3), default=n_chosen_from)
    if choice is None or owned >= n_chosen_from or experts.entered is None:
        return False
    last = torch.full_like(choice.indices[1], n_chosen_from - 1)
    args, kwargs = fresh_arguments(experts)
    args = tuple(last if one is choice.indices[1] else one for one in args)
    kwargs = {name: last if one is choice.indices[1] else one for name, one in kwargs.items()}
    left = traced(experts.module, lambda: experts.module(*args, **kwargs)).visits[0].left
    if left is None or not bool(left.any()):
        return False if left is not None else None
    total = choice.weights[1].sum(-1, keepdim=True)
    return True if same(left, experts.entered.flatten(0, -2) * total) else None
