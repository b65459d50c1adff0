"""One call of a function that a mixer's code calls: its arguments and its result in canonical axes."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from clearspan.points import Function, Role


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function.

    Attributes:
        role: What it is called for.
        function: Which function, and how its axes lie.
        original: The function itself.
        named: Its arguments by the names of its parameters.
        positional: The names of those that were given by position.
        length: Tokens of this forward, or None if unknown.
    """

    role: Role
    function: Function
    original: Callable[..., Any]
    named: Mapping[str, Any]
    positional: tuple[str, ...]
    length: int | None = None

    @classmethod
    def of(
        cls,
        role: Role,
        function: Function,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        length: int | None = None,
    ) -> "FunctionCall":
        """Returns a call with these arguments."""
        names = tuple(inspect.signature(original).parameters)[: len(args)]
        return cls(role, function, original, {**dict(zip(names, args, strict=True)), **kwargs}, names, length)

    def run(self, **changed: Any) -> Any:
        """Calls the function.

        Args:
            **changed: Arguments that differ.
        """
        named = {**self.named, **changed}
        args = [named.pop(name) for name in self.positional]
        return self.original(*args, **named)

    # --- arguments ---------------------------------------------------------------------------------------------------

    def raw(self, value: str) -> Tensor | None:
        """Returns the argument that holds a value, as the function gets it; None where it gets none."""
        argument = self.function.arguments.get(value)
        return None if argument is None else self.named.get(argument.name)

    def value(self, value: str) -> Tensor | None:
        """Returns the value that an argument holds, a view in canonical axes; None where the function gets none."""
        raw = self.raw(value)
        return None if raw is None else shown(raw, self.function.arguments[value].axes, self.role.axes[value])

    def with_value(self, value: str, new: Tensor) -> "FunctionCall":
        """Returns the call with another value, given in canonical axes."""
        argument, raw = self.function.arguments[value], self.raw(value)
        assert raw is not None, f"the function gets {value}"
        laid = laid_out(new.to(raw.dtype), argument.axes, self.role.axes[value], self.sizes)
        return self.replaced({argument.name: _as_dense_as(raw, laid)})

    def replaced(self, changed: Mapping[str, Any]) -> "FunctionCall":
        """Returns the call with other arguments."""
        return replace(self, named={**self.named, **changed})

    @property
    def carried(self) -> Tensor:
        """The value that the state sums up over tokens, `[batch, pos, ...]`."""
        value = self.value(self.role.carried)
        assert value is not None, "the function gets what it carries"
        return value

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all axes of the arguments."""
        found: dict[str, int] = {"pos": 1}
        for value, argument in self.function.arguments.items():
            raw = self.raw(value)
            if raw is not None:
                found |= zip(argument.axes.replace("(", "").replace(")", "").split(), raw.shape, strict=True)
        return found

    @property
    def step_sizes(self) -> Tensor | None:
        """The step sizes that the function uses: with their bias, after softplus and limits."""
        steps, bias = self.value("raw_dt"), self.value("dt_bias")
        if steps is None:
            return None
        if bias is not None:
            steps = steps + bias.to(steps.dtype)
        if self.function.softplus and self.named.get(self.function.softplus):
            steps = softplus(steps)
        limits = self.named.get("dt_limit")
        return steps if limits is None else steps.clamp(*limits)

    def with_step_sizes(self, steps: Tensor) -> "FunctionCall":
        """Returns the call with other step sizes, which the function uses as they are."""
        changed: dict[str, Any] = {}
        if self.function.softplus:
            changed[self.function.softplus] = False
        if "dt_bias" in self.function.arguments:
            changed[self.function.arguments["dt_bias"].name] = None
        if self.named.get("dt_limit") is not None:
            changed["dt_limit"] = (-float("inf"), float("inf"))
        return self.with_value("raw_dt", steps).replaced(changed)

    # --- the state and the result ------------------------------------------------------------------------------------

    @property
    def past(self) -> Tensor | None:
        """The state that the sequence before left, as the function gets it; None where there is none."""
        return None if self.function.state is None else self.named.get(self.function.state.name)

    @property
    def has_past(self) -> bool:
        """Whether tokens came before this forward's: where a cache always gives a state, one that is not zero."""
        return self.past is not None and bool(self.past.any())

    def apart(self) -> "FunctionCall":
        """Returns the call on a copy of its state, where it writes the state: it can be run beside this one."""
        if self.past is None or self.function.state is None or not self.function.writes_state:
            return self
        return self.replaced({self.function.state.name: self.past.clone()})

    def ungated_result(self, output: Any) -> Tensor:
        """Returns the result before the gate that the function multiplies it by; this may write the state.

        Args:
            output: What the function gave back.
        """
        plain = self.ungated()
        return self.result(output) if plain is self else plain.result(plain.apart().run())

    def result(self, output: Any) -> Tensor:
        """Returns the result in canonical axes, of the forward's own tokens."""
        raw = output[0] if isinstance(output, tuple | list) else output
        value = shown(raw, self.function.result, self.role.axes["out"])
        return value[:, -self.length :] if self.function.is_longer and self.length else value

    def with_result(self, output: Any, new: Tensor) -> Any:
        """Returns what the function gives back with another result, given in canonical axes."""
        raw, *others = output if isinstance(output, tuple | list) else (output,)
        axes = self.role.axes["out"]
        whole = shown(raw, self.function.result, axes)
        before = whole[:, : whole.shape[1] - new.shape[1]]  # earlier tokens, where there are any
        laid = laid_out(torch.cat([before, new.to(raw.dtype)], dim=1), self.function.result, axes, self.sizes)
        made = _as_dense_as(raw, laid)
        return type(output)([made, *others]) if isinstance(output, tuple | list) else made

    def with_state(self, output: Any, last: Tensor) -> Any:
        """Returns what the function gives back with another last state, where it gives that back or writes it."""
        if self.past is not None and self.function.writes_state:
            with torch.no_grad():
                self.past.copy_(last)
        if isinstance(output, tuple | list) and output[1] is not None:
            return type(output)([output[0], last.to(output[1].dtype), *output[2:]])
        return output

    def ungated(self) -> "FunctionCall":
        """Returns the call without the gate that the function multiplies its result by, where it gets one."""
        return self if self.raw("gate") is None else self.replaced({self.function.arguments["gate"].name: None})

    def gated(self, result: Tensor) -> Tensor:
        """Returns a result times the gate that the function multiplies it by."""
        gate = self.value("gate")
        return result if gate is None else result * silu(gate)


def sizes_of(axes: Mapping[str, str], values: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the sizes of all axes of some values.

    Args:
        axes: The axes of each value.
        values: Values by name.
    """
    found: dict[str, int] = {}
    for name, value in values.items():
        for axis, size in zip(axes[name].split(), value.shape, strict=True):
            found[axis] = max(size, found.get(axis, 1))
    return found


def shown(raw: Tensor, axes: str, canonical: str) -> Tensor:
    """Returns a view of a tensor in canonical axes; those that it lacks have one place.

    Args:
        raw: The tensor.
        axes: Its axes; those in parentheses, which repeat the same numbers, are left out.
        canonical: The canonical axes.
    """
    names = axes.split()
    for place, name in reversed(list(enumerate(names))):
        if name.startswith("("):
            raw = raw.select(place, 0)
    kept, wanted = [name for name in names if not name.startswith("(")], canonical.split()
    view = raw.permute([kept.index(name) for name in wanted if name in kept])
    for place, name in enumerate(wanted):
        if name not in kept:
            view = view.unsqueeze(place)
    return view


def laid_out(value: Tensor, axes: str, canonical: str, sizes: Mapping[str, int]) -> Tensor:
    """Inverse of `shown`: returns a value with the axes of a function.

    Args:
        value: The value in canonical axes.
        axes: The function's axes.
        canonical: The canonical axes.
        sizes: Sizes of the axes in parentheses.
    """
    names, have = axes.split(), canonical.split()
    for place, name in reversed(list(enumerate(have))):
        if name not in names:
            value = value.select(place, 0)
    have = [name for name in have if name in names]
    value = value.permute([have.index(name) for name in names if not name.startswith("(")])
    for place, name in enumerate(names):
        if name.startswith("("):
            value = value.unsqueeze(place)
    return value.expand([sizes[name.strip("()")] if name.startswith("(") else -1 for name in names])


def _as_dense_as(raw: Tensor, laid: Tensor) -> Tensor:
    """Returns a tensor with the strides of another one, which kernels expect."""
    if laid.stride() == raw.stride():
        return laid
    return laid if 0 in raw.stride() else torch.empty_like(raw).copy_(laid)
