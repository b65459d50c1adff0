"""Functions that a module's code calls, as data: which values they are given and return, and how their axes lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Argument:
    """One argument of a function.

    Attributes:
        name: The parameter's name.
        axes: Its axes in the order of the function. One in parentheses repeats the same numbers (an expanded axis).
    """

    name: str
    axes: str


@dataclass(frozen=True, eq=False)
class Function:
    """One function, or method, that a module's code calls.

    Attributes:
        name: The name by which the code calls it. `forward` is the module's own forward.
        arguments: Its arguments by the value that each holds.
        result: Axes of what it returns; of a tuple, the first.
        state: The argument with the state that the sequence before left, where it has one.
        writes_state: Whether it writes the new state into that argument, instead of returning it after its result.
        softplus: The argument that says whether step sizes still go through a softplus, where it has one.
        is_longer: Whether values of earlier tokens come before those of the forward's tokens in its result.
        settings: Arguments that have it return the state that it leaves.
        keeps: Further arguments of the function for sequences that it is given as well.
    """

    name: str
    arguments: Mapping[str, Argument]
    result: str
    state: Argument | None = None
    writes_state: bool = False
    softplus: str | None = None
    is_longer: bool = False
    settings: Mapping[str, bool] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Role:
    """What a module calls a function for: one function for whole sequences and perhaps another one for single tokens.

    Some values are no argument: `out` is the result; `dt` the step sizes after bias and softplus, computed of
    `raw_dt` and `dt_bias`; `state` the state after each token, and `attention` how much of each token's `carried` value
    is in each later token's result, both found by calling the model's own functions.

    Attributes:
        name: Its name.
        functions: The functions. The last one takes single tokens.
        axes: Canonical axes of each value.
        carried: The value that the state sums up over tokens, in which the result is linear; empty if it is in none.
        still: Values with which a token leaves the state as it is, all numbers zero.
        fused: Functions that do all that the module does; while someone listens they are answered with None, upon which
            the module calls the others.
        caller: Path, in the mixer, of the module that calls the function.
    """

    name: str
    functions: tuple[Function, ...]
    axes: Mapping[str, str]
    carried: str = ""
    still: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    caller: str = ""

    @property
    def recurrent(self) -> Function:
        """The function that takes single tokens."""
        return self.functions[-1]

    def __repr__(self) -> str:
        return f"Role({self.name!r}, {', '.join(function.name for function in self.functions)})"
