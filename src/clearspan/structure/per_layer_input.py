"""A layer's own input, which the model hands to a block beside the stream, and the maps around it."""

import inspect
from collections.abc import Iterator, Sequence

from torch import Tensor

from clearspan.components import ActivationBridge, PerLayerInputBridge
from clearspan.structure.algebra import linear_kind, same
from clearspan.structure.templates import linear_template
from clearspan.structure.trace import Visit


def find_per_layer_input(block: Visit, inside: Sequence[Visit], out: Visit) -> tuple[PerLayerInputBridge, Visit] | None:
    """Returns the template of the maps around a layer's own input, and the call that reads the stream, or None.

    What the output map reads is then the product of an activation function's output and of an argument of the block.

    Args:
        block: The block's call.
        inside: Calls in the block.
        out: The call of the linear map whose output is added.
    """
    hidden = out.entered
    if hidden is None:
        return None
    wide = [one for one in inside if one.order < out.order and one.left is not None and one.left.shape == hidden.shape]
    for argument, given in _given(block, hidden):
        for act in (one for one in wide if not linear_kind(one)):
            gate = next((one for one in wide if linear_kind(one) and same(one.left, act.entered)), None)
            if gate is not None and act.left is not None and same(act.left * given, hidden):
                names = {key: one.path.removeprefix(f"{block.path}.") for key, one in (("gate", gate), ("out", out))}
                parts = {
                    "gate": linear_template(gate, names["gate"]),
                    "act": ActivationBridge(act.path.removeprefix(f"{block.path}.")),
                    "out": linear_template(out, names["out"]),
                }
                return PerLayerInputBridge(submodules=parts, argument=argument), gate
    return None


def _given(block: Visit, hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the block's arguments that are like a tensor, by name."""
    names = list(inspect.signature(block.module.forward).parameters)
    for name, value in [*zip(names, block.args, strict=False), *block.kwargs.items()]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == hidden.shape:
            yield name, value
