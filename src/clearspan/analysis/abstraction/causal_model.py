"""Causal models as data: variables that are functions of one another, and what comes out when one is exchanged."""

import graphlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from clearspan.errors import InvalidArgumentError
from clearspan.points import nearest

Setting = Mapping[str, Hashable]
"""Values by the variable's name."""
Mechanism = Callable[..., Hashable]
"""Gives a variable; its parameters are named after what it depends on."""


@dataclass(frozen=True)
class CausalModel:
    """A high-level account of what is computed: each variable is a function of inputs and other variables.

    The names of a function's parameters say what it depends on. A name that is no variable's is an input.

    Attributes:
        variables: Their functions by name, in any order.
        output: The variable that is the answer.

    Raises:
        InvalidArgumentError: The output is no variable, variables depend on each other in a circle, or a function has
            parameters that are no names, or have defaults.

    Example:
        >>> agree = CausalModel(
        ...     {
        ...         "left": lambda a, b: a == b,
        ...         "right": lambda c, d: c == d,
        ...         "answer": lambda left, right: left == right,
        ...     },
        ...     output="answer",
        ... )
        >>> agree.inputs
        ('a', 'b', 'c', 'd')
        >>> base, source = dict(a=1, b=1, c=2, d=3), dict(a=4, b=5, c=6, d=6)
        >>> agree.run(base)["answer"], agree.interchange(base, source, ["left"])
        (False, True)

    References:
        Geiger, Lu, Icard and Potts (2021), "Causal Abstractions of Neural Networks", arXiv:2106.02997.
    """

    variables: Mapping[str, Mechanism]
    output: str
    parents: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    """What each variable depends on; causes come before effects."""

    def __post_init__(self) -> None:
        if self.output not in self.variables:
            raise InvalidArgumentError(
                f"the output {self.output!r} is no variable",
                expected=", ".join(self.variables) or "a variable",
                nearest=nearest(self.output, self.variables),
            )
        parents = {name: _parameters(name, function) for name, function in self.variables.items()}
        try:
            order = [name for name in graphlib.TopologicalSorter(parents).static_order() if name in parents]
        except graphlib.CycleError as error:
            raise InvalidArgumentError(
                "variables depend on each other in a circle", got=" -> ".join(reversed(error.args[1]))
            ) from None
        object.__setattr__(self, "parents", {name: parents[name] for name in order})

    @property
    def inputs(self) -> tuple[str, ...]:
        """What variables depend on and is no variable itself, in the order in which it is first named."""
        named = [parent for name in self.variables for parent in self.parents[name]]
        return tuple(name for name in dict.fromkeys(named) if name not in self.variables)

    def run(self, setting: Setting, fixed: Setting | None = None) -> dict[str, Hashable]:
        """Returns the values of inputs and variables.

        Args:
            setting: The inputs' values. What else it holds is passed over.
            fixed: Values that inputs or variables have, whatever they depend on.

        Raises:
            InvalidArgumentError: An input has no value, or what is fixed is neither an input nor a variable.
        """
        fixed = fixed or {}
        self._check(fixed)
        lacking = [name for name in self.inputs if name not in setting and name not in fixed]
        if lacking:
            raise InvalidArgumentError(
                f"the input {lacking[0]!r} has no value", expected=", ".join(self.inputs), got=", ".join(setting)
            )
        values = {name: fixed[name] if name in fixed else setting[name] for name in self.inputs}
        for name, parents in self.parents.items():
            is_fixed = name in fixed
            values[name] = fixed[name] if is_fixed else self.variables[name](**{each: values[each] for each in parents})
        return values

    def interchange(self, base: Setting, source: Setting, variables: Sequence[str]) -> Hashable:
        """Returns the output for the base's inputs, with some variables as they are for the source's.

        Args:
            base: The inputs of the run that is changed.
            source: The inputs of the run that values are taken from.
            variables: Which; an input can be one of them.
        """
        self._check(dict.fromkeys(variables))
        taken = self.run(source)
        return self.run(base, {name: taken[name] for name in variables})[self.output]

    def _check(self, names: Setting) -> None:
        known = (*self.inputs, *self.variables)
        for name in names:
            if name not in known:
                raise InvalidArgumentError(
                    f"{name!r} is neither an input nor a variable",
                    expected=", ".join(known),
                    nearest=nearest(name, known),
                )


def _parameters(name: str, function: Mechanism) -> tuple[str, ...]:
    found = inspect.signature(function).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in found:
        if parameter.kind not in by_name or parameter.default is not inspect.Parameter.empty:
            raise InvalidArgumentError(
                f"the function of {name!r} does not say what it depends on",
                expected="parameters that are names of inputs and variables, without defaults",
                got=str(parameter),
            )
    return tuple(parameter.name for parameter in found)
