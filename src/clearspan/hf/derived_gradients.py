"""Gradients of derived values, computed from the gradient at their target without touching the forward."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.points import Derivation, Derived, HookPoint


@dataclass(frozen=True)
class Arrival:
    """What a derivation's target saw in one forward.

    Attributes:
        output: The target's raw tensor, with the edits.
        source: The source's raw tensor.
        edits: The edited parts.
        entered: The input of the target's module.
    """

    output: Tensor
    source: Tensor
    edits: Mapping[str, Tensor]
    entered: Tensor

    def detached(self) -> "Arrival":
        """Returns the same tensors outside the graph."""
        edits = {part: value.detach() for part, value in self.edits.items()}
        return Arrival(self.output.detach(), self.source.detach(), edits, self.entered.detach())


def derived_gradient(derivation: Derivation, part: str, arrival: Arrival, gradient: Tensor) -> Tensor:
    """Returns the gradient of one part's value, given that of the target's raw tensor.

    It is the vector-Jacobian product of the derivation's own `write`, at the value that the part had.
    """
    seen = arrival.detached()
    with torch.enable_grad():
        value = derivation.read(part, seen.source, seen.edits).clone().requires_grad_()
        written = derivation.write(seen.output, seen.source, {**seen.edits, part: value}, seen.entered)
        (result,) = torch.autograd.grad(written, value, gradient)
    return result


def backpropagate(point: HookPoint, derivation: Derivation, arrival: Arrival) -> None:
    """Calls the point's backward listeners when the gradient reaches the target.

    What a listener changes of the value's gradient is carried back to the source, by the vector-Jacobian product of the
    derivation's `read`.
    """
    assert isinstance(point.access, Derived)
    part = point.access.part
    carried: list[Tensor] = []
    calls = point.backward_calls()  # those of this forward, also when they are off again by the time of backward

    def at_target(gradient: Tensor) -> None:
        original = current = derived_gradient(derivation, part, arrival, gradient)
        for call in calls:
            edited = call(current)
            current = current if edited is None else edited
        if current is not original:
            with torch.enable_grad():
                source = arrival.source.detach().requires_grad_()
                value = derivation.read(part, source, {})
                carried.append(torch.autograd.grad(value, source, current - original)[0])

    def at_source(gradient: Tensor) -> Tensor | None:
        return gradient + sum(carried) if carried else None

    arrival.output.register_hook(at_target)
    arrival.source.register_hook(at_source)
