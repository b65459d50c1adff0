"""What a mixer is, found from its module: which kind, and the sizes of its axes, as adapters say them."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from clearspan.components import MixerKind, kind_among
from clearspan.hf.attention import Call
from clearspan.hf.functions import names_called
from clearspan.hf.observers import observed
from clearspan.hf.watch import Visits
from clearspan.points import Passed, Role


def mixer_kind(module: nn.Module) -> MixerKind | None:
    """Returns the kind of mixer that a module is, by the functions that its code calls; None for anything else.

    The functions may also be called by one of its parts, where the kind says so.
    """
    found = kind_among(names_called(type(module)))
    if found is not None:
        return found
    for name, part in module.named_children():
        kind = kind_among(names_called(type(part)))
        if kind is not None and any(role.caller == name for role in kind.roles):
            return kind
    return None


def axis_sizes(module: nn.Module, kind: MixerKind, run: Callable[[], Any]) -> dict[str, int]:
    """Returns the sizes of a mixer's own axes, as `MixerBridge.dims` has them, seen in a forward.

    Args:
        module: The mixer's module.
        kind: Its kind.
        run: Runs the model once, without a KV cache.

    Raises:
        NotSeenError: The forward does not call the functions of this kind, each once.
    """
    sizes: dict[str, int] = {}

    def visit(axes: str) -> Callable[[Tensor], Tensor]:
        def note(value: Tensor) -> Tensor:
            sizes.update(zip(axes.split(), value.shape, strict=True))
            return value

        return note

    def observer(roles: list[Role]) -> Callable[[Call], Any]:
        visits: Visits = {
            Passed(role, value): visit(role.axes[value]) for role in roles for value in _given(kind, role)
        }
        return lambda call: call.run_watched(visits)

    by_caller: dict[str, list[Role]] = {}
    for role in kind.roles:
        by_caller.setdefault(role.caller, []).append(role)
    observers: Mapping[nn.Module, Callable[[Call], Any]] = {
        module.get_submodule(caller): observer(roles) for caller, roles in by_caller.items()
    }
    with observed(observers):
        run()
    return {axis: size for axis, size in sizes.items() if axis not in ("batch", "pos", "width")}


def _given(kind: MixerKind, role: Role) -> list[str]:
    """Returns the values of a role that its functions are given, or return, and that are points of the kind."""
    shown = {value for name, value in kind.points.values() if name == role.name}
    given = role.functions[0].arguments
    return [value for value in role.axes if value in shown and (value == "out" or value in given)]
