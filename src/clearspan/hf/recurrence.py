"""What visitors make of a call of a mixer's function: its arguments, the state after each token, and its result.

States come from the model's own function for single tokens, token by token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clearspan.errors import NotSeenError
from clearspan.hf.effective_attention import effective_attention
from clearspan.hf.function_call import FunctionCall, laid_out, shown, sizes_of

Visit = Callable[[Tensor], Tensor]


def visited(call: FunctionCall, visits: Mapping[str, Visit], single: Callable[..., Any] | None) -> Any:
    """Runs a call with what visitors make of its values; returns what the function gives back.

    Args:
        call: The call.
        visits: The visitors by the values that they see.
        single: The function for single tokens, or None where the model has none.
    """
    rates: Tensor | None = None
    for value in call.role.axes:
        if value not in visits or value in ("attention", "state", "out"):
            continue
        before = _value(call, value)
        new = visits[value](before)
        if new is before:
            continue
        if value == "A":  # which the function takes for all tokens
            rates = new
        else:
            call = call.with_step_sizes(new) if value == "dt" else call.with_value(value, new)
    if "attention" in visits:
        visits["attention"](effective_attention(call))
    apart = call.apart()  # before the call writes its state
    if rates is None and "state" not in visits:
        return _finished(call, call.run(), None, apart, visits)
    return _by_token(call, apart, single, rates, visits)


def _value(call: FunctionCall, value: str) -> Tensor:
    """Returns a value of a call in canonical axes.

    Raises:
        NotSeenError: The function gets no such value.
    """
    found = call.step_sizes if value == "dt" else call.value(value)
    if found is None:
        raise NotSeenError(
            f"the {value} of this mixer cannot be reached here",
            where=call.function.name,
            reason="the model's code does not give it to the function in this forward",
        )
    if value != "A":
        return found
    return found.expand(*call.carried.shape[:2], *found.shape[2:])  # one for all rows and positions


def _finished(
    call: FunctionCall, output: Any, result: Tensor | None, apart: FunctionCall, visits: Mapping[str, Visit]
) -> Any:
    """Returns what the function gives back, with its result as visited: before the gate that it multiplies it by.

    Args:
        call: The call.
        output: What the function gave back.
        result: The result before the gate, where it is another one.
        apart: The call, on a state of its own.
        visits: The visitors.
    """
    if "out" in visits:
        before = apart.ungated_result(output) if result is None else result
        new = visits["out"](before)
        result = result if new is before else new
    return output if result is None else call.with_result(output, call.gated(result))


# --- token by token --------------------------------------------------------------------------------------------------


def _by_token(
    call: FunctionCall,
    apart: FunctionCall,
    single: Callable[..., Any] | None,
    rates: Tensor | None,
    visits: Mapping[str, Visit],
) -> Any:
    """Runs a call whose states are visited, or where A is another one at each token, `rates`."""
    steps = Steps.of(apart, single, rates)
    output = call.run()
    after = steps.states() if "state" in visits else None
    new = after if after is None else visits["state"](after)
    if new is after and rates is None:
        return _finished(call, output, None, apart, visits)
    edited = None if new is after else new
    result, last = steps.run_with(after, edited)
    is_same = edited is None or (after is not None and torch.equal(edited, after))
    if is_same and (rates is None or torch.equal(rates, _value(apart, "A"))):
        # Only gradients flow there: no number changes.
        native = apart.ungated_result(output)
        result = native.detach() + (result - result.detach()).to(native.dtype)
    else:
        output = call.with_state(output, last)
    return _finished(call, output, result, apart, visits)


class _Captured(TorchFunctionMode):
    """Keeps what a function writes into its state, and leaves the state as it was, so that gradients can flow."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self._state = state
        self.written = state

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and args[0] is self._state:
            self.written = args[1]
            return self._state
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Steps:
    """A call of a function for sequences, made token by token with the function for single tokens.

    Attributes:
        call: The call.
        single: The function for single tokens.
        values: What each token's step is given, in canonical axes; step sizes as the function uses them.
        first: The state before the first token.
    """

    call: FunctionCall
    single: Callable[..., Any]
    values: Mapping[str, Tensor]
    first: Tensor

    @classmethod
    def of(cls, call: FunctionCall, single: Callable[..., Any] | None, rates: Tensor | None) -> "Steps":
        """Returns a call token by token.

        Args:
            call: The call.
            single: The function for single tokens, or None where the model has none.
            rates: A at each token, `[batch, pos, ...]`; by default the call's own for all tokens.
        """
        role = call.role
        state = role.recurrent.state
        if single is None or state is None:
            raise NotSeenError(
                "the state after each token cannot be reached here",
                where=call.function.name,
                reason=f"the model's code has no function {role.recurrent.name} for single tokens",
            )
        found = {name: call.step_sizes if name == "raw_dt" else call.value(name) for name in role.recurrent.arguments}
        values = {name: one for name, one in found.items() if one is not None and name not in ("dt_bias", "gate")}
        if rates is not None:
            values["A"] = rates
        sizes = {**sizes_of(role.axes, values), "batch": len(call.carried)}
        zeros = call.carried.new_zeros([sizes[axis] for axis in state.axes.split()], dtype=torch.float32)
        return cls(call, single, values, zeros if call.past is None else call.past)

    def states(self) -> Tensor:
        """Returns the state after each token, `[batch, pos, ...]`; each on the graph of its own token alone."""
        states, state = [], self.first
        for token in range(self.call.carried.shape[1]):
            _, state = self._step(self._at(token), state.detach())
            states.append(state)
        return torch.stack(states, dim=1)

    def run_with(self, after: Tensor | None, edited: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the results of all tokens, and the last state.

        A state that was edited is carried on to the tokens after it, up to the next one that was.

        Args:
            after: The state after each token as it was.
            edited: The same as edited, or None.
        """
        results, state = [], self.first
        for token in range(self.call.carried.shape[1]):
            values = self._at(token)
            if after is None or edited is None:
                result, state = self._step(values, state)
            else:
                state = self._carried(values, state, after[:, token], edited[:, token])
                still = self.call.role.still
                result, _ = self._step(
                    {name: torch.zeros_like(one) if name in still else one for name, one in values.items()}, state
                )
            results.append(result)
        return torch.cat(results, dim=1), state

    def _carried(self, values: Mapping[str, Tensor], state: Tensor, before: Tensor, new: Tensor) -> Tensor:
        """Returns the state after a token: as edited in rows where it was, elsewhere as it follows from the last one.

        Gradients reach the edited state from all tokens that it is carried on to, and this token's values through it.
        """
        _, carried = self._step({name: one.detach() for name, one in values.items()}, state)
        was_edited = (new != before).flatten(1).any(1).view(-1, *[1] * (new.ndim - 1))
        return torch.where(was_edited, new, carried + (new - new.detach()))

    def _at(self, token: int) -> dict[str, Tensor]:
        """Returns the values of one token; what all tokens share stays as it is."""
        axes = self.call.role.axes
        return {
            name: value[:, token : token + 1] if "pos" in axes[name].split() and value.shape[1] > 1 else value
            for name, value in self.values.items()
        }

    def _step(self, values: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result of one token, `[batch, 1, ...]`, and the state after it."""
        axes, rates = self.call.role.axes, values.get("A")
        if rates is None or len(rates) == 1:
            return self._of_rows(values, state)
        rows = []
        for row in range(len(state)):  # the function takes one A for all rows
            has_rows = {name for name, one in values.items() if axes[name].startswith("batch") and len(one) > 1}
            own = {name: one[row : row + 1] if name in has_rows else one for name, one in values.items()}
            rows.append(self._of_rows(own, state[row : row + 1]))
        results, states = zip(*rows, strict=True)
        return torch.cat(results), torch.cat(states)

    def _of_rows(self, values: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        role, function = self.call.role, self.call.role.recurrent
        assert function.state is not None, "the function for single tokens has a state"
        sizes = sizes_of(role.axes, values)
        named: dict[str, Any] = {}
        for name, value in values.items():
            argument = function.arguments[name]
            named[argument.name] = laid_out(value, argument.axes, role.axes[name], sizes)
        kept = {name: self.call.named[name] for name in function.keeps if name in self.call.named}
        given = state.clone() if function.writes_state else state
        with _Captured(given) as captured:
            output = self.single(**kept, **named, **function.settings, **{function.state.name: given})
        raw, after = output if isinstance(output, tuple | list) else (output, captured.written)
        return shown(raw, function.result, role.axes["out"]), after.to(state.dtype)
