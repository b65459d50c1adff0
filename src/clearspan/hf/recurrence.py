"""What a mixer's functions compute besides their result: the state after each token, and effective attention.

Both come from calling the model's own functions: the one for single tokens, token by token, and the one for sequences
on basis vectors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clearspan.errors import NotSeenError
from clearspan.hf.function_call import FunctionCall, laid_out, shown

Visit = Callable[[Tensor], Tensor]
BASIS = 32
"""How many basis vectors go through a function at a time, which bounds the memory in use."""


def visited(call: FunctionCall, visits: Mapping[str, Visit], recurrent: Callable[..., Any] | None) -> Any:
    """Runs a call with what visitors make of its values; returns what the function gives back.

    Args:
        call: The call.
        visits: The visitors by the values that they see.
        recurrent: The function for single tokens, or None where the model has none.
    """
    rates: Tensor | None = None
    for value in call.role.axes:
        if value not in visits or value in ("state", "attention", "out"):
            continue
        before = _value(call, value)
        new = visits[value](before)
        if new is before:
            continue
        if value == "A":
            rates = new
        elif value == "dt":
            call = call.with_step_sizes(new)
        else:
            call = call.with_value(value, new)
    if "attention" in visits:
        visits["attention"](effective_attention(call))
    if rates is None and "state" not in visits:
        return _result_visited(call, visits)
    steps = Steps(call, recurrent)
    return steps.visited(visits, rates)


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
    if value == "A":  # one for all rows and positions
        carried = call.value(call.role.carried)
        assert carried is not None, "the function gets what it carries"
        return found.expand(*carried.shape[:2], *found.shape[2:])
    return found


def _result_visited(call: FunctionCall, visits: Mapping[str, Visit]) -> Any:
    """Runs a call whose result is visited before the gate that the function multiplies it by."""
    if "out" not in visits:
        return call.run()
    if call.value("gate") is None:
        output = call.run()
        before = call.result(output)
        new = visits["out"](before)
        return output if new is before else call.with_result(output, new)
    plain = call.ungated()
    if call.function.writes_state and call.past is not None and call.function.state is not None:
        plain = plain.replaced({call.function.state.name: call.past.clone()})
    before = plain.result(plain.run())
    new = visits["out"](before)
    output = call.run()
    return output if new is before else call.with_result(output, call.gated(new))


# --- the state after each token --------------------------------------------------------------------------------------


class _Captured(TorchFunctionMode):
    """Keeps what a function writes into its state, and leaves the state as it was, so that gradients can flow."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state
        self.written: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and args[0] is self.state:
            self.written = args[1]
            return self.state
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Steps:
    """A call of a function for sequences, made token by token with the function for single tokens.

    Attributes:
        call: The call.
        recurrent: The function for single tokens.
    """

    call: FunctionCall
    recurrent: Callable[..., Any] | None

    def visited(self, visits: Mapping[str, Visit], rates: Tensor | None) -> Any:
        """Returns what the call gives back, with the state and the result as visited.

        Args:
            visits: The visitors of state and result.
            rates: The numbers to use in the place of A, `[batch, pos, ...]`, or None.
        """
        values = self._values(rates)
        first = self._first_state()
        after = self._after_each(values, first)
        states = shown_states = after if "state" in visits else None
        if states is not None:
            shown_states = visits["state"](states)
        is_same = shown_states is states and rates is None
        plain = self.call
        output = self._natively()
        if is_same:
            return self._with_out(plain, output, None, None, visits)
        edited = None if states is None or shown_states is states else shown_states
        results, last = self._through(values, first, after, edited)
        changes_nothing = (edited is None or torch.equal(edited, after)) and (
            rates is None or torch.equal(rates, _value(self.call, "A"))
        )
        if changes_nothing:  # it is only on the gradient's path
            native = plain.ungated().result(output) if self._gate() is None else self._ungated_result()
            results = native.detach() + (results - results.detach()).to(native.dtype)
            last = None
        return self._with_out(plain, output, results, last, visits)

    def _gate(self) -> Tensor | None:
        return self.call.value("gate")

    def _natively(self) -> Any:
        """Runs the call as it is."""
        return self.call.run()

    def _ungated_result(self) -> Tensor:
        plain = self.call.ungated()
        if plain.function.writes_state and plain.function.state is not None:
            plain = plain.replaced({plain.function.state.name: self._past_copy})
        return plain.result(plain.run())

    @property
    def _past_copy(self) -> Tensor | None:
        return None if self.call.past is None else self.call.past.clone()

    def _with_out(
        self,
        call: FunctionCall,
        output: Any,
        results: Tensor | None,
        last: Tensor | None,
        visits: Mapping[str, Visit],
    ) -> Any:
        """Returns what the function gives back: its own output, or one with other results before the gate."""
        if "out" in visits:
            before = results if results is not None else call.result(output)
            if results is None and self._gate() is not None:
                before = self._ungated_result()
            new = visits["out"](before)
            results = results if new is before else new
        state = None
        if last is not None and call.function.state is not None:
            state = last
            past = call.past
            if call.function.writes_state and past is not None:
                with torch.no_grad():
                    past.copy_(last)
        if results is None:
            return output
        return call.with_result(output, call.gated(results), state)

    # --- one token ---------------------------------------------------------------------------------------------------

    def _values(self, rates: Tensor | None) -> dict[str, Tensor]:
        """Returns all values that a step needs, in canonical axes; step sizes as the function uses them."""
        call, found = self.call, {}
        for name in call.role.recurrent.arguments:
            value = call.step_sizes if name == "raw_dt" else call.value(name)
            if value is not None and name not in ("dt_bias", "gate"):
                found[name] = value
        return found if rates is None else {**found, "A": rates}

    def _first_state(self) -> Tensor:
        role, past = self.call.role, self.call.past
        state = role.recurrent.state
        if self.recurrent is None or state is None:
            raise NotSeenError(
                "the state after each token cannot be reached here",
                where=self.call.function.name,
                reason=f"the model's code has no function {role.recurrent.name} for single tokens",
            )
        if past is not None:
            return past.clone()
        sizes = {**_sizes(role.axes, self._values(None))}
        like = self.call.value(role.carried)
        assert like is not None, "the function gets what it carries"
        return like.new_zeros([len(like) if axis == "batch" else sizes[axis] for axis in state.axes.split()]).float()

    def _step(self, values: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result of one token, `[batch, 1, ...]`, and the state after it."""
        role, function = self.call.role, self.call.role.recurrent
        assert self.recurrent is not None and function.state is not None, "there is a function for single tokens"
        rates = values.get("A")
        if rates is not None and len(rates) > 1:  # the function takes one A for all rows
            rows = [
                self._step({name: self._row(name, one, row) for name, one in values.items()}, state[row : row + 1])
                for row in range(len(state))
            ]
            outs, states = zip(*rows, strict=True)
            return torch.cat(outs), torch.cat(states)
        sizes = _sizes(role.axes, values)
        named: dict[str, Any] = {
            function.arguments[name].name: laid_out(value, function.arguments[name].axes, role.axes[name], sizes)
            for name, value in values.items()
        }
        mapped = {argument.name for argument in self.call.function.arguments.values()}
        theirs = {self.call.function.state.name} if self.call.function.state else set()
        others = {
            name: value
            for name, value in self.call.named.items()
            if name not in mapped | theirs and name not in _FOR_SEQUENCES
        }
        given = state.clone() if function.writes_state else state
        with _Captured(given) as captured:
            output = self.recurrent(**{**others, **named, **function.settings, function.state.name: given})
        raw = output[0] if isinstance(output, tuple | list) else output
        if function.writes_state:
            after = given if captured.written is None else captured.written
        else:
            after = output[1]
        return shown(raw, function.result, role.axes["out"]), after.to(state.dtype)

    def _row(self, name: str, value: Tensor, row: int) -> Tensor:
        has_rows = self.call.role.axes[name].startswith("batch") and len(value) > 1
        return value[row : row + 1] if has_rows else value

    # --- all tokens --------------------------------------------------------------------------------------------------

    def _at(self, values: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
        """Returns the values of one token; what all tokens share stays as it is."""
        axes = self.call.role.axes
        return {
            name: value[:, position : position + 1] if "pos" in axes[name].split() and value.shape[1] > 1 else value
            for name, value in values.items()
        }

    def _after_each(self, values: Mapping[str, Tensor], first: Tensor) -> Tensor:
        """Returns the state after each token, `[batch, pos, ...]`; each with the graph of its own token alone."""
        states, state = [], first
        for position in range(self._length(values)):
            _, after = self._step(self._at(values, position), state.detach())
            states.append(after)
            state = after
        return torch.stack(states, dim=1)

    def _through(
        self, values: Mapping[str, Tensor], first: Tensor, after: Tensor, edited: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the results of all tokens and the last state, where the state after each is as edited.

        What a state was changed to is carried on to the tokens after it, but to those whose own was changed as well.
        """
        results, state = [], first
        for position in range(self._length(values)):
            here = self._at(values, position)
            if edited is None:
                out, state = self._step(here, state)
                results.append(out)
                continue
            frozen = {name: value.detach() for name, value in here.items()}
            _, carried = self._step(frozen, state)
            new = edited[:, position]
            was_changed = (new != after[:, position]).flatten(1).any(1).view(-1, *[1] * (new.ndim - 1))
            state = torch.where(was_changed, new, carried + (new - new.detach()))
            still = {
                name: torch.zeros_like(value) if name in self.call.role.still else value for name, value in here.items()
            }
            out, _ = self._step(still, state)
            results.append(out)
        return torch.cat(results, dim=1), state

    def _length(self, values: Mapping[str, Tensor]) -> int:
        return values[self.call.role.carried].shape[1]


_FOR_SEQUENCES = (
    "chunk_size",
    "dt_limit",
    "dt_bias",
    "delta_bias",
    "delta_softplus",
    "dt_softplus",
    "return_last_state",
    "return_final_states",
    "use_mambapy",
    "use_associative_scan",
    "initial_states",
    "z",
)
"""Arguments that say how a sequence is computed, or that are accounted for in a step's own arguments."""


def _sizes(axes: Mapping[str, str], values: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the sizes of all axes of some values."""
    found: dict[str, int] = {}
    for name, value in values.items():
        for axis, size in zip(axes[name].split(), value.shape, strict=True):
            found[axis] = max(size, found.get(axis, 1))
    return found


# --- effective attention ---------------------------------------------------------------------------------------------


def effective_attention(call: FunctionCall) -> Tensor:
    """Returns how much of each token's carried value is in each token's result, `[batch, head, q_pos, k_pos]`.

    Raises:
        NotSeenError: There are tokens before this forward's, of which only the state is known.
    """
    if call.past is not None:
        raise NotSeenError(
            "effective attention cannot be reached here",
            where=call.function.name,
            reason="a KV cache holds the state that earlier tokens left, not what each of them added to it",
            fix="run the whole sequence without a KV cache",
        )
    role = call.role
    values = call.value(role.carried)
    assert values is not None, "the function gets what it carries"
    rows, length, heads, _ = values.shape
    plain = call.ungated()
    skip = call.function.arguments.get("D")
    plain = plain if skip is None else plain.replaced({skip.name: None})
    with torch.no_grad():
        found = [
            _of_tokens(plain, values, range(start, min(start + BASIS, length))) for start in range(0, length, BASIS)
        ]
    return torch.cat(found, dim=-1).view(rows, heads, length, length)


def _of_tokens(call: FunctionCall, values: Tensor, tokens: range) -> Tensor:
    """Returns the results for values that are one at a token and zero elsewhere, `[batch, head, q_pos, token]`."""
    rows, length, heads, _ = values.shape
    basis = values.new_zeros(len(tokens), length, heads, 1)
    for place, token in enumerate(tokens):
        basis[place, token] = 1
    repeated = {
        argument.name: raw.detach().repeat_interleave(len(tokens), dim=0)
        for value, argument in call.function.arguments.items()
        if argument.axes.startswith("batch") and (raw := call.raw(value)) is not None
    }
    carried = call.function.arguments[call.role.carried]
    axes = call.role.axes[call.role.carried]
    laid = laid_out(basis.repeat(rows, 1, 1, 1), carried.axes, axes, call.sizes).contiguous()
    many = replace(call, named={**call.named, **repeated, carried.name: laid}, length=length)
    out = many.result(many.run())  # [(batch token), q_pos, head, 1]
    return out[..., 0].unflatten(0, (rows, len(tokens))).permute(0, 3, 2, 1)
