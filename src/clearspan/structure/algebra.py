"""The algebra by which tensors of a trace are told to be made of each other."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from clearspan.structure.trace import Visit


def tolerance(dtype: torch.dtype) -> float:
    """Returns how far tensors of a dtype may be apart, relative to their largest value, and be one by rounding."""
    return {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 3e-2)


def same(one: Tensor | None, other: Tensor | None, scale: Tensor | None = None) -> bool:
    """Returns whether two tensors have the same values in the same order, whatever their shapes.

    Args:
        one: A tensor.
        other: Another.
        scale: What a difference is small beside; by default the other tensor's largest value.
    """
    if one is None or other is None or one.numel() != other.numel() or not one.numel():
        return False
    if not (one.is_floating_point() and other.is_floating_point()):
        return False
    first, second = one.double().reshape(-1), other.double().reshape(-1)
    largest = second.abs().max() if scale is None else scale.double()
    return bool((first - second).abs().max() <= tolerance(_coarser(one.dtype, other.dtype)) * largest.clamp(min=1e-12))


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max(one, other, key=tolerance)


def factor(one: Tensor, other: Tensor) -> float | None:
    """Returns the number that makes a tensor another one of the same size, or None where there is none."""
    if one.numel() != other.numel():
        return None
    first, second = one.double().reshape(-1), other.double().reshape(-1)
    ratio = float((first * second).sum() / first.square().sum().clamp(min=1e-300))
    found = same(first.to(one.dtype) * ratio, other)
    return rounded(ratio) if found else None


def rounded(number: float) -> float:
    """Returns a number without the last digits that a regression leaves uncertain."""
    return float(f"{number:.6g}")


def coefficients(parts: Sequence[Tensor], total: Tensor) -> list[float] | None:
    """Returns the numbers with which tensors add up to another, or None where there are none."""
    columns = torch.stack([part.double().reshape(-1) for part in parts], 1)
    target = total.double().reshape(-1)
    found = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    if not bool(found.isfinite().all()) or not same((columns @ found).to(total.dtype), total):
        return None
    return [rounded(float(one)) for one in found]


def sum_of(candidates: Sequence[Tensor], total: Tensor, most: int, scale: Tensor) -> tuple[int, ...] | None:
    """Returns which tensors add up to another, as few as possible, or None.

    Args:
        candidates: The tensors, of the total's size.
        total: What they add up to.
        most: How many of them at most.
        scale: What a difference is small beside.
    """
    flat = [one.double().reshape(-1) for one in candidates]
    target = total.double().reshape(-1)
    allowed = tolerance(total.dtype) * float(scale)
    few = torch.linspace(0, target.numel() - 1, min(64, target.numel())).long()
    short, short_target = [one[few] for one in flat], target[few]
    for count in range(1, most + 1):
        for chosen in itertools.combinations(range(len(flat)), count):
            if float((sum(short[index] for index in chosen) - short_target).abs().max()) > allowed:
                continue
            if float((sum(flat[index] for index in chosen) - target).abs().max()) <= allowed:
                return chosen
    return None


Found = TypeVar("Found")


def once(find: Callable[[Visit], Found]) -> Callable[[Visit], Found]:
    """Returns a function that keeps what it finds of a call with the call."""

    @functools.wraps(find)
    def found(visit: Visit) -> Found:
        if find not in visit.known:
            visit.known[find] = find(visit)
        return cast("Found", visit.known[find])

    return found


@dataclass(frozen=True)
class NormKind:
    """How a module norms its last axis.

    Attributes:
        is_rms: Whether it does not subtract the mean.
        offset: What is added to the weight before it multiplies.
    """

    is_rms: bool
    offset: float


@once
def norm_kind(visit: Visit) -> NormKind | None:
    """Returns how a module norms, found by computing its output again; None where it is no norm."""
    entered, left = visit.entered, visit.left
    if entered is None or left is None or entered.shape != left.shape or not entered.is_floating_point():
        return None
    if visit.module._modules:
        return None
    weight, bias = (visit.module._parameters.get(name) for name in ("weight", "bias"))
    if weight is not None and entered.shape[entered.ndim - weight.ndim :] != weight.shape:
        return None
    exact = entered.double()
    for is_rms, offset in itertools.product((True, False), (0.0, 1.0) if weight is not None else (0.0,)):
        centred = exact if is_rms else exact - exact.mean(-1, keepdim=True)
        result = centred / (centred.square().mean(-1, keepdim=True) + eps_of(visit.module)).sqrt()
        if weight is not None:
            result = result * (weight.double() + offset)
        if same((result if bias is None else result + bias.double()).to(left.dtype), left):
            return NormKind(is_rms, offset)
    return None


def eps_of(module: nn.Module) -> float:
    """Returns what a norm adds to the variance."""
    named = (vars(module).get(name) for name in ("eps", "variance_epsilon", "epsilon", "norm_eps"))
    return next((one for one in named if isinstance(one, float)), 1e-5)


@dataclass(frozen=True)
class LinearKind:
    """A linear map.

    Attributes:
        inputs: Width of its input.
        outputs: Width of its output.
        is_transposed: Whether its weight is `[in, out]`.
    """

    inputs: int
    outputs: int
    is_transposed: bool


@once
def linear_kind(visit: Visit) -> LinearKind | None:
    """Returns a module's kind of linear map, found by computing its output again; None where it is none."""
    weight, bias = (visit.module._parameters.get(name) for name in ("weight", "bias"))
    entered, left = visit.entered, visit.left
    if weight is None or weight.ndim != 2 or visit.module._modules or entered is None or left is None:
        return None
    if not (entered.is_floating_point() and weight.is_floating_point()):
        return None
    for is_transposed in (False, True):
        matrix = weight.T if is_transposed else weight
        if matrix.shape != (left.shape[-1], entered.shape[-1]):
            continue
        result = entered.double() @ matrix.double().T
        if same((result if bias is None else result + bias.double()).to(left.dtype), left):
            return LinearKind(matrix.shape[1], matrix.shape[0], is_transposed)
    return None


def as_tokens(value: Tensor, rows: int, positions: int) -> Tensor | None:
    """Returns a tensor as `[row, pos, width]`, whichever way its rows, positions and heads lie; None for another."""
    match value.shape:
        case (first, second, *_) if (first, second) == (rows, positions):
            return value.flatten(2) if value.ndim > 2 else None
        case (first, _, third, *_) if (first, third) == (rows, positions) and value.ndim > 3:
            return value.transpose(1, 2).flatten(2)
        case (first, *_) if first == rows * positions and value.ndim > 1:
            return value.flatten(1).unflatten(0, (rows, positions))
    return None


@dataclass(frozen=True)
class Origin:
    """Where the channels of a tensor come from.

    Attributes:
        visit: The call that gave them.
        channels: For each channel, which of the call's output it is.
        ratios: For each channel, what that is multiplied by.
    """

    visit: Visit
    channels: tuple[int, ...]
    ratios: tuple[float, ...]


def origins(target: Tensor, calls: Sequence[tuple[Visit, Tensor]]) -> list[tuple[Visit, int, float] | None]:
    """Returns for each channel of a tensor the last call that gave it, which channel it was there, and its multiple.

    A call that gave it as it is goes before those that gave a multiple.

    Args:
        target: `[row, channel]`.
        calls: Calls in order, each with its output `[row, channel]` for the same rows.
    """
    wanted = target.double()
    units = wanted / wanted.norm(dim=0).clamp(min=1e-300)
    found: list[tuple[Visit, int, float] | None] = [None] * wanted.shape[1]
    best = [1 - tolerance(target.dtype) ** 2] * wanted.shape[1]
    for visit, there in calls:
        exact = there.double()
        norms = exact.norm(dim=0).clamp(min=1e-300)
        likeness = (units.T @ (exact / norms)).abs()
        for channel, (alike, index) in enumerate(zip(*(one.tolist() for one in likeness.max(1)), strict=True)):
            if alike >= best[channel] - EQUAL and float(wanted[:, channel].norm()) > 0:
                ratio = float(wanted[:, channel] @ exact[:, index] / norms[index].square())
                known = found[channel]
                if known is not None and abs(known[2] - 1) < AS_IT_IS < abs(ratio - 1):
                    continue
                found[channel], best[channel] = (visit, index, ratio), max(alike, best[channel])
    return found


EQUAL = 1e-9
"""How far likenesses may be apart that are the same: the later call counts then."""
AS_IT_IS = 1e-4
"""How far a multiple may be from 1 by rounding."""
