"""Gradients of derived values that the forward does not pass through, from the gradient at their target.

A query's own input is one of several readers of the residual stream. To put it in the way would cut the query off from
what all of them read, so its gradient is computed beside the graph: source, parts and target are made once more, with
the model's own gradient at the target.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.points import Derivation, Derived, HookPoint

HookCall = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Arrival:
    """What a derivation's target saw in one forward.

    Attributes:
        derivation: The derivation.
        part: The part whose gradient is asked for.
        output: The target's raw tensor, in the model's graph.
        source: The source's raw tensor.
        entered: The input of the target's module.
    """

    derivation: Derivation
    part: str
    output: Tensor
    source: Tensor
    entered: Tensor

    def gradient(self, at_target: Tensor) -> Tensor:
        """Returns the gradient of the part, given that of the target."""
        source = self.source.detach()
        with torch.enable_grad():
            value = self.derivation.read(self.part, source, {}).clone().requires_grad_()
            written = self.derivation.write(self.output.detach(), source, {self.part: value}, self.entered.detach())
            return torch.autograd.grad(written, value, at_target)[0]


def backpropagate(
    derivation: Derivation, points: Sequence[HookPoint], output: Tensor, source: Tensor, entered: Tensor
) -> None:
    """Calls backward listeners of a derivation's parts when the gradient reaches the target.

    The parts are made in their order, so that a change of a later one's gradient is in an earlier one's. What the
    listeners change of the gradient is added where the source's gradient arrives.

    Args:
        derivation: The derivation.
        points: Its points with backward listeners, in order.
        output: The target's raw tensor.
        source: The source's raw tensor, which nothing else reads.
        entered: The input of the target's module.
    """
    # The listeners of this forward, also when they are off again by the time of backward.
    calls = [(point, point.backward_calls()) for point in points]
    changes: list[Tensor] = []

    def at_target(gradient: Tensor) -> None:
        leaf = source.detach().requires_grad_()
        changed = False
        with torch.enable_grad():
            edits: dict[str, Tensor] = {}
            for point, listeners in calls:
                assert isinstance(point.access, Derived), "only derived points have a target"
                edits[point.access.part] = value = derivation.read(point.access.part, leaf, edits).clone()
                for listener in listeners:

                    def call(given: Tensor, listener: HookCall = listener) -> Tensor | None:
                        nonlocal changed
                        edited = listener(given)
                        changed = changed or edited is not None
                        return edited

                    value.register_hook(call)
            written = derivation.write(output.detach(), leaf, edits, entered.detach())
            after = torch.autograd.grad(written, leaf, gradient)[0]
            if changed:
                changes.append(after - _unchanged(derivation, edits, output, source, entered, gradient))

    def at_source(gradient: Tensor) -> Tensor | None:
        return gradient + changes.pop() if changes else None

    output.register_hook(at_target)
    source.register_hook(at_source)


def _unchanged(
    derivation: Derivation,
    parts: Mapping[str, Tensor],
    output: Tensor,
    source: Tensor,
    entered: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Returns the source's gradient through these parts when nobody changes it."""
    leaf = source.detach().requires_grad_()
    edits: dict[str, Tensor] = {}
    for part in parts:
        edits[part] = derivation.read(part, leaf, edits)
    written = derivation.write(output.detach(), leaf, edits, entered.detach())
    return torch.autograd.grad(written, leaf, gradient)[0]
