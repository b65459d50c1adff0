"""Gradients of derived values that the forward does not pass through, from the gradients at their targets.

A query's own input is one of several readers of the residual stream. To put it in the way would cut the query off from
what all of them read, so its gradient is computed beside the graph: source, parts and targets are made once more, with
the model's own gradients at the targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.points import Derivation, Derived, HookPoint, Place

HookCall = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Arrival:
    """What one target of a derivation saw in one forward.

    Attributes:
        derivation: The derivation.
        part: The part whose gradient is asked for.
        target: The target.
        output: The target's raw tensor, in the model's graph.
        source: The source's raw tensor.
        entered: The input of the target's module.
    """

    derivation: Derivation
    part: str
    target: Place
    output: Tensor
    source: Tensor
    entered: Tensor

    def gradient(self, at_target: Tensor) -> Tensor:
        """Returns what reaches the part of the gradient at this target."""
        source = self.source.detach()
        with torch.enable_grad():
            value = self.derivation.read(self.part, source, {}).clone().requires_grad_()
            written = self.derivation.write(
                self.target, self.output.detach(), source, {self.part: value}, self.entered.detach()
            )
            return torch.autograd.grad(written, value, at_target)[0]


class Beside:
    """The parts of a derivation in one forward whose gradient is computed beside the graph.

    What listeners change of it is added where the source's gradient arrives, which is after those of all targets.

    Args:
        derivation: The derivation.
        source: The source's raw tensor, a node of its own in the graph.
    """

    def __init__(self, derivation: Derivation, source: Tensor) -> None:
        self._derivation = derivation
        self._source = source
        # The listeners of this forward, also when they are off again by the time of backward.
        self._points: list[tuple[HookPoint, str, list[HookCall]]] = []
        self._outputs: dict[Place, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[Place, Tensor] = {}

    def add(self, point: HookPoint) -> None:
        """Adds a part's point, in the order in which the parts fire."""
        assert isinstance(point.access, Derived), "only derived points have targets"
        if not any(calls for _, _, calls in self._points) and point.listeners("bwd"):
            self._source.register_hook(self._at_source)
        self._points.append((point, point.access.part, point.backward_calls()))

    def arrive(self, target: Place, output: Tensor, entered: Tensor) -> None:
        """Notes what a target saw: its raw tensor in the model's graph, and the input of its module."""
        reaching = [(point, part) for point, part, _ in self._points if target in self._derivation.reached_by(part)]
        for point, part in reaching:
            if point.gradient_sink is not None:
                point.gradient_sink(point, Arrival(self._derivation, part, target, output, self._source, entered))
        if reaching and output.requires_grad and any(calls for _, _, calls in self._points):
            self._outputs[target] = (output.detach(), entered.detach())
            output.register_hook(lambda gradient: self._gradients.__setitem__(target, gradient))

    def _at_source(self, gradient: Tensor) -> Tensor | None:
        """Calls the listeners with their parts' gradients; returns the source's with what they changed."""
        changed = False

        def noting(listener: HookCall) -> HookCall:
            def call(given: Tensor) -> Tensor | None:
                nonlocal changed
                edited = listener(given)
                changed = changed or edited is not None
                return edited

            return call

        leaf, edits = self._parts()
        for _, part, calls in self._points:
            for listener in calls:
                edits[part].register_hook(noting(listener))
        after = self._back(leaf, edits)
        if not changed:
            return None
        return gradient + after - self._back(*self._parts())

    def _parts(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the source as a leaf, and the parts made of it in their order."""
        leaf = self._source.detach().requires_grad_()
        edits: dict[str, Tensor] = {}
        with torch.enable_grad():
            for _, part, calls in self._points:
                if calls:
                    edits[part] = self._derivation.read(part, leaf, edits).clone()
        return leaf, edits

    def _back(self, leaf: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns the leaf's gradient through the parts from those of the targets."""
        written, gradients = [], []
        with torch.enable_grad():
            for target, gradient in self._gradients.items():
                output, entered = self._outputs[target]
                reaching = {part: edits[part] for part in edits if target in self._derivation.reached_by(part)}
                if reaching:
                    written.append(self._derivation.write(target, output, leaf, reaching, entered))
                    gradients.append(gradient)
        return torch.autograd.grad(written, leaf, gradients)[0]
