"""Derived values in one forward: edits on their way from a source to its targets, and gradients apart from the graph.

A query's own input is one of several readers of the residual stream. Putting it in the way of the others would cut the
query off from what all of them read, so its gradient is computed apart from the graph: source, parts and targets are
made once more, with the model's own gradients at the targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clearspan.errors import ConflictingWritesError
from clearspan.points import Derivation, Derived, HookPoint, Place, Side

HookCall = Callable[[Tensor], Tensor | None]


@dataclass
class Pending:
    """A derivation's edits, on their way from its source to its targets.

    Attributes:
        derivation: The derivation.
        source: The source's raw tensor.
        edits: Parts that were changed, or put on the gradient's path.
        only_gradient: Whether nobody changed a part.
        separate: Points whose gradient is computed apart from the graph, or None.
    """

    derivation: Derivation
    source: Tensor
    edits: dict[str, Tensor] = field(default_factory=dict)
    only_gradient: bool = True
    separate: "SeparateGradients | None" = None

    def await_gradient(self, point: HookPoint) -> None:
        """Computes the gradient of a part's point apart from the graph, once the targets' gradients are there."""
        if self.separate is None:
            self.separate = SeparateGradients(self.derivation, self.source)
        self.separate.add(point)

    def arrive(self, target: Place, raw: Tensor, entered: Tensor) -> Tensor:
        """Carries the edits out at a target; returns the raw tensor that the model uses.

        Args:
            target: The target.
            raw: The raw tensor there.
            entered: The input of the target's module.
        """
        edits = {part: value for part, value in self.edits.items() if target in self.derivation.reached_by(part)}
        if edits:
            _check_alone(self.derivation, target, raw, self.source, edits, entered)
            written = self.derivation.write(target, raw, self.source, edits, entered)
            # Parts that are only on the gradient's path change no number.
            raw = raw.detach() + (written - written.detach()) if self.only_gradient else written
        if self.separate is not None:
            # An input may have other readers: this one gets a node of its own.
            raw = raw.view_as(raw) if target.side is Side.INPUT else raw
            self.separate.arrive(target, raw, entered)
        return raw


def _check_alone(
    derivation: Derivation, target: Place, raw: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor
) -> None:
    """Raises if a target holds something else than its weights give: computing it again would undo what changed it.

    Raises:
        ConflictingWritesError: Another torch hook, or an adapter on the module, changed it.
    """
    with torch.no_grad():
        source, entered, found = source.detach(), entered.detach(), raw.detach()
        unedited = {part: derivation.read(part, source, {}) for part in edits}
        expected = derivation.write(target, found, source, unedited, entered)
        difference = (expected.double() - found.double()).abs().max()
        allowed = _rounding(found) * found.double().abs().max()
    if difference > allowed:
        raise ConflictingWritesError(
            "a derived value was written where something else changes what is computed of it",
            where=str(target),
            reason="a torch hook or an adapter on this module, which computing it again from the weights would undo",
            fix="take that off, or write a point that is no derived one, such as hook_q, hook_z or hook_attn_out",
        )


def _rounding(tensor: Tensor) -> float:
    """Returns by how much two ways to compute a tensor may differ, relative to its largest number."""
    eps, full = torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps
    if eps > full:
        return 8 * eps
    # Many models compute norms in float32 whatever their dtype.
    return 2e-3 if tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32 else 64 * full


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
        """Returns how much of the gradient at this target reaches the part."""
        source = self.source.detach()
        with torch.enable_grad():
            value = self.derivation.read(self.part, source, {}).clone().requires_grad_()
            written = self.derivation.write(
                self.target, self.output.detach(), source, {self.part: value}, self.entered.detach()
            )
            return torch.autograd.grad(written, value, at_target)[0]


class SeparateGradients:
    """The parts of a derivation in one forward whose gradient is computed apart from the graph.

    What listeners change in it is added to the source's gradient, which arrives after those of all targets.

    Args:
        derivation: The derivation.
        source: The source's raw tensor, a node of its own in the graph.
    """

    def __init__(self, derivation: Derivation, source: Tensor) -> None:
        self._derivation = derivation
        self._source = source
        # The listeners of this forward: they may be off again when backward runs.
        self._points: list[tuple[HookPoint, str, list[HookCall]]] = []
        self._outputs: dict[Place, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[Place, Tensor] = {}

    def add(self, point: HookPoint) -> None:
        """Adds a part's point, in the order in which the parts fire."""
        assert isinstance(point.access, Derived), "only derived points have targets"
        if not any(calls for _, _, calls in self._points) and point.heard("bwd"):
            self._source.register_hook(self._at_source)
        self._points.append((point, point.access.part, point.backward_calls()))

    def arrive(self, target: Place, output: Tensor, entered: Tensor) -> None:
        """Keeps what a target saw: its raw tensor in the model's graph, and the input of its module."""
        reaching = [(point, part) for point, part, _ in self._points if target in self._derivation.reached_by(part)]
        for point, part in reaching:
            sink = point.gradient_sink
            if sink is not None:
                sink(point, Arrival(self._derivation, part, target, output, self._source, entered))
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
        return gradient + after - self._back(*self._parts()) if changed else None

    def _parts(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the source as a leaf, and the parts computed from it in their order."""
        leaf = self._source.detach().requires_grad_()
        edits: dict[str, Tensor] = {}
        with torch.enable_grad():
            for _, part, calls in self._points:
                if calls:
                    edits[part] = self._derivation.read(part, leaf, edits).clone()
        return leaf, edits

    def _back(self, leaf: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns the leaf's gradient through the parts, from those of the targets."""
        written, gradients = [], []
        with torch.enable_grad():
            for target, gradient in self._gradients.items():
                output, entered = self._outputs[target]
                reaching = {part: edits[part] for part in edits if target in self._derivation.reached_by(part)}
                if reaching:
                    written.append(self._derivation.write(target, output, leaf, reaching, entered))
                    gradients.append(gradient)
        return torch.autograd.grad(written, leaf, gradients)[0]
