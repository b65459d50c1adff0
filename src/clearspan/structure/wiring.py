"""How a block is wired: what is added to the residual stream, in which order, and by which modules."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from clearspan.components import GeneralizedComponent, HyperConnectionBridge
from clearspan.components.factors import Factor
from clearspan.structure.algebra import coefficients, norm_kind, same, sum_of, tolerance
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.scalars import output_scalar, unscaled
from clearspan.structure.trace import Trace, Visit

MOST = 5
"""How many contributions a block may have."""


@dataclass(eq=False)
class Contribution:
    """What one sublayer adds to the residual stream.

    Attributes:
        calls: The calls whose output it is, in the order of the forward.
        value: It, before the block's own factor.
        factor: What the block multiplies it by: a number, or the path in the block of a parameter `[d_model]`.
        post_norm: The norm on the sublayer's output, or None.
        source: The calls whose output is the sublayer's before that norm.
        summands: The calls whose sum that norm reads, where no one call gives it.
        late_bias: Path in the block of a parameter that it has besides the calls' output; empty where it has none.
        is_late: Whether it is added after those of all sublayers that run after it, a shortcut past them.
    """

    calls: list[Visit]
    value: Tensor
    factor: Factor = 1.0
    post_norm: Visit | None = None
    source: list[Visit] = field(default_factory=list)
    summands: list[Visit] = field(default_factory=list)
    is_late: bool = False
    late_bias: str = ""


@dataclass(eq=False)
class Wiring:
    """How a block is wired.

    Attributes:
        block: The block's call.
        contributions: What is added, in order.
        streams: The residual stream that enters, and after each contribution.
        norms_the_sum: Norms of the stream after each contribution, if it is wired so.
        carries: What the stream is multiplied by before each stage's contributions are added; empty where by nothing.
        residual_norms: Norms whose output the stream goes on as, if it is wired so.
        connections: The hyper-connection of each contribution, of a residual of several streams.
        extra: Further parts of the block by canonical name.
        scalar: What multiplies the stream at the block's end: a number, or the block's parameter or buffer; or None.
    """

    block: Visit
    contributions: list[Contribution]
    streams: list[Tensor]
    norms_the_sum: list[Visit] = field(default_factory=list)
    carries: list[Factor] = field(default_factory=list)
    residual_norms: list[Visit] = field(default_factory=list)
    connections: list[HyperConnectionBridge] = field(default_factory=list)
    extra: dict[str, GeneralizedComponent] = field(default_factory=dict)
    scalar: Factor | None = None


def find_wiring(trace: Trace, block: Visit) -> Wiring:
    """Returns how a block is wired.

    Raises:
        MissingStructureError: The stream that leaves is no sum of the one that enters and of modules' outputs.
    """
    calls = _of_stream(trace, block)
    scalar = output_scalar(block)
    whole = block if scalar is None else unscaled(block, scalar)
    for wired in (_before, _normed_residual, _after, _stepwise, _by_parameters):
        found = wired(whole, calls)
        if found is not None:
            found.block, found.scalar = block, scalar
            for one in found.contributions:
                look_behind_norm(one, calls)
            return found
    raise MissingStructureError(f"what {block.path} adds to the residual stream is no sum of modules' outputs")


def _of_stream(trace: Trace, block: Visit) -> list[Visit]:
    """Returns the calls in a block whose output is as large as the stream."""
    size = _entered(block).shape
    return [
        one
        for one in trace.inside(block)
        if one.left is not None
        and one.left.is_floating_point()
        and one.left.numel() == size.numel()
        and one.left.shape[-1] == size[-1]
    ]


def _entered(visit: Visit) -> Tensor:
    assert visit.entered is not None, "the call takes a tensor"
    return visit.entered


def _left(visit: Visit) -> Tensor:
    assert visit.left is not None, "calls without an output are left out"
    return visit.left


def _classes(calls: Sequence[Visit]) -> list[list[Visit]]:
    """Returns the calls in groups of one output."""
    groups: list[list[Visit]] = []
    for call in calls:
        group = next((one for one in groups if same(_left(one[0]), _left(call))), None)
        if group is None:
            groups.append([call])
        else:
            group.append(call)
    return groups


def _before(block: Visit, calls: Sequence[Visit]) -> Wiring | None:
    """Returns the wiring of a block whose norms come before its sublayers, or on their outputs alone."""
    start, end = _entered(block), _left(block)
    added = end.double() - start.double()
    found = [Contribution(group, _left(group[0])) for group in _classes(calls)]
    for candidates in (found, [*found, *_with_late_biases(block, found)]):
        chosen = sum_of([one.value for one in candidates], added.to(end.dtype), MOST, _scale(added, start, end))
        if chosen is not None:
            break
    else:
        return None
    contributions = [candidates[index] for index in chosen]
    contributions.sort(key=lambda one: min(call.order for call in one.calls))
    return _summed(block, contributions, [call for call in calls if norm_kind(call)])


def _with_late_biases(block: Visit, found: Sequence[Contribution]) -> Iterator[Contribution]:
    """Yields contributions with a vector added that a module around their calls holds and does not add itself."""
    width = _left(block).shape[-1]
    for path, module in block.module.named_modules():
        around = f"{block.path}.{path}" if path else block.path
        for name, own in module._parameters.items():
            if module._modules and own is not None and own.shape == (width,):
                inner = [one for one in found if any(call.is_in(around) for call in one.calls)]
                for one in inner:
                    value = one.value + own.detach()
                    yield Contribution(one.calls, value, late_bias=f"{path}.{name}".lstrip("."))


def _scale(added: Tensor, *streams: Tensor) -> Tensor:
    """Returns what a difference is small beside, in what is added: the largest of it, or of what rounding leaves.

    In half precision a stream that is much larger than what is added rounds it coarsely, once for each addition.
    """
    dtype = streams[0].dtype
    rounding = ROUNDINGS * torch.finfo(dtype).eps / tolerance(dtype)
    return max(added.abs().max(), *(stream.double().abs().max() * rounding for stream in streams))


ROUNDINGS = 3
"""How often a stream is rounded in a block, as far as sums are compared."""


def _summed(block: Visit, contributions: list[Contribution], norms: Sequence[Visit]) -> Wiring:
    """Returns contributions in the order in which they are added, with the stream after each.

    That is the order in which they run, unless norms read more of these streams if one is added last.
    """
    orders = [contributions, *([*_without(contributions, one), one] for one in contributions[:-1])]
    streams = [_streams(block, one) for one in orders]
    read = [sum(any(same(norm.entered, stream) for stream in one) for norm in norms) for one in streams]
    best = read.index(max(read))
    orders[best][-1].is_late = best > 0
    return Wiring(block, orders[best], streams[best])


def _without(contributions: Sequence[Contribution], one: Contribution) -> list[Contribution]:
    return [other for other in contributions if other is not one]


def _streams(block: Visit, contributions: Sequence[Contribution]) -> list[Tensor]:
    """Returns the stream that enters, and after each contribution."""
    stream = _entered(block).double()
    streams = [_entered(block)]
    for one in contributions[:-1]:
        stream = stream + one.value.double().reshape(stream.shape)
        streams.append(stream.to(_left(block).dtype))
    return [*streams, _left(block)]


def _normed_residual(block: Visit, calls: Sequence[Visit]) -> Wiring | None:
    """Returns the wiring of a block whose residual branch takes the norm's output."""
    start, end = _entered(block), _left(block)
    norms = [call for call in calls if norm_kind(call)]
    for first in (one for one in norms if same(one.entered, start)):
        for second in (one for one in norms if one.order > first.order):
            pairs = ((first, _entered(second)), (second, end))
            groups = _classes(calls)
            values = [_left(group[0]) for group in groups]
            found: list[Contribution] = []
            for norm, total in pairs:
                added = total.double().reshape(end.shape) - _left(norm).double().reshape(end.shape)
                chosen = sum_of(values, added.to(end.dtype), 1, added.abs().max())
                if chosen is not None:
                    found.append(Contribution(groups[chosen[0]], values[chosen[0]]))
            if len(found) == 2:
                return Wiring(block, found, [start, _entered(second), end], residual_norms=[first, second])
    return None


def _after(block: Visit, calls: Sequence[Visit]) -> Wiring | None:
    """Returns the wiring of a block that norms the stream after each sublayer has added to it."""
    stream, end = _entered(block), _left(block)
    norms = [call for call in calls if norm_kind(call)]
    found: list[Contribution] = []
    passed: list[Visit] = []
    streams = [stream]
    while not same(stream, end):
        step = next(_steps(stream, [one for one in norms if one not in passed], calls), None)
        if step is None or len(found) == MOST:
            return None
        norm, contribution = step
        found.append(contribution)
        passed.append(norm)
        stream = _left(norm).reshape(end.shape)
        streams.append(stream)
    return Wiring(block, found, streams, norms_the_sum=passed) if found else None


def _steps(stream: Tensor, norms: Sequence[Visit], calls: Sequence[Visit]) -> Iterator[tuple[Visit, Contribution]]:
    for norm in norms:
        added = _entered(norm).double().reshape(stream.shape) - stream.double()
        groups = _classes([call for call in calls if call.order < norm.order])
        values = [_left(group[0]) for group in groups]
        chosen = sum_of(values, added.to(stream.dtype), 1, added.abs().max())
        if chosen is not None and float(added.abs().max()) > 0:
            yield norm, Contribution(groups[chosen[0]], values[chosen[0]])


def _stepwise(block: Visit, calls: Sequence[Visit]) -> Wiring | None:
    """Returns the wiring of a block that multiplies what is added, or the stream, or a norm of it, by numbers.

    Each norm that reads a stream tells what the stream is there.
    """
    return _step_by_step(block, calls, _step)


def _by_parameters(block: Visit, calls: Sequence[Visit]) -> Wiring | None:
    """Returns the wiring of a block that multiplies what is added, or the stream, by vectors of its own."""
    width = _entered(block).shape[-1]
    vectors = {
        name: own.detach().double()
        for name, own in block.module._parameters.items()
        if own is not None and own.shape == (width,)
    }
    return _step_by_step(block, calls, partial(_step_by_vectors, vectors)) if vectors else None


Step = tuple[Visit | None, Factor, list[Contribution]]
"""How a stream becomes the next: the norm that it goes on as, its multiple, and what is added."""


def _step_by_step(block: Visit, calls: Sequence[Visit], step: Callable[..., Step | None]) -> Wiring | None:
    """Returns the wiring whose steps, from each stream that a norm reads to the next, are found one by one."""
    stream, end = _entered(block), _left(block)
    norms = [call for call in calls if norm_kind(call)]
    wiring = Wiring(block, [], [stream])
    for target in (*(_entered(norm).reshape(end.shape) for norm in norms), end):
        if same(target, stream):
            continue
        found = step(stream, target, norms, calls)
        if found is not None:
            base, carry, made = found
            wiring.contributions += made
            wiring.carries += [carry]
            wiring.residual_norms += [] if base is None else [base]
            stream = target
            # A stream for each contribution, of which those of one step read the first.
            wiring.streams += [*[target] * (len(made) - 1), target]
    # Each stage's residual branch is a norm's output, or none is.
    are_alike = len(wiring.residual_norms) in (0, len(wiring.carries))
    return wiring if same(stream, end) and wiring.contributions and are_alike else None


def _step_by_vectors(
    vectors: Mapping[str, Tensor], stream: Tensor, target: Tensor, _: Sequence[Visit], calls: Sequence[Visit]
) -> Step | None:
    """Returns how a stream becomes the next by one contribution, where one or both are multiplied by vectors."""
    factors: dict[Factor, Tensor | float] = {1.0: 1.0, **vectors}
    groups = _classes(calls)
    for carry, by in factors.items():
        added = target.double() - stream.double() * by
        for factor, number in factors.items():
            values = [_left(group[0]).double().reshape(target.shape) * number for group in groups]
            chosen = sum_of(values, added.to(target.dtype), 1, added.abs().max())
            if chosen is not None:
                group = groups[chosen[0]]
                return None, carry, [Contribution(group, _left(group[0]), factor)]
    return None


def _step(stream: Tensor, target: Tensor, norms: Sequence[Visit], calls: Sequence[Visit]) -> Step | None:
    """Returns how a stream becomes the next, by numbers."""
    groups = _classes(calls)
    values = [_left(group[0]).reshape(target.shape) for group in groups]
    bases = [(None, stream), *((one, _left(one).reshape(target.shape)) for one in norms if same(one.entered, stream))]
    for count in (1, 2):
        for base, value in bases:
            others = [index for index, one in enumerate(values) if not same(one, value)]
            for chosen in itertools.combinations(others, count):
                found = coefficients([value, *(values[index] for index in chosen)], target)
                if found is not None and all(abs(one) > 1e-6 for one in found):
                    pairs = zip(chosen, found[1:], strict=True)
                    made = [Contribution(groups[index], values[index], number) for index, number in pairs]
                    return base, found[0], sorted(made, key=lambda one: one.calls[0].order)
    return None


def look_behind_norm(one: Contribution, calls: Sequence[Visit]) -> None:
    """Finds the norm on a sublayer's output, and what it norms."""
    norm = next((call for call in one.calls if norm_kind(call)), None)
    if norm is None:
        one.source = one.calls
        return
    behind = [call for call in calls if call.order < norm.order and same(_left(call), norm.entered)]
    if behind:
        one.post_norm, one.source = norm, behind
        return
    one.source = one.calls
    if any(call is not norm and norm.is_in(call.path) for call in one.calls):
        return  # the norm is a module's own, which has the summands too
    groups = _classes([call for call in calls if call.order < norm.order])
    entered = _entered(norm)
    values = [_left(group[0]).reshape(entered.shape) for group in groups]
    chosen = sum_of(values, entered, 2, entered.double().abs().max()) or ()
    if len(chosen) == 2:
        one.post_norm, one.summands = norm, [groups[index][0] for index in chosen]
