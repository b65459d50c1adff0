"""Causal models as data: variables that are functions of one another, and examples of what an exchange should do."""

import graphlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from clearspan.analysis.abstraction.interchange import Answers, InterchangeExamples
from clearspan.analysis.activations import Targets
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_flags
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Input
from clearspan.model import check_bridge
from clearspan.points import nearest

Setting = Mapping[str, Hashable]
"""Values by the variable's name."""
Mechanism = Callable[..., Hashable]
"""Gives a variable; its parameters are named after what it depends on."""
Prompt = Callable[[Setting], str] | Callable[[Setting], Sequence[int]]
"""From an input of the causal model to text, or to token ids."""
PromptPosition = int | Sequence[int] | Callable[[Setting], int] | Callable[[Setting], Sequence[int]]
"""One position or several for all prompts, or a function that gives them for each."""

_PATIENCE = 100
"""How many pairs may be looked at for each one wanted."""


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
        named = self.variables.items() if isinstance(self.variables, Mapping) else ()
        if not named or not all(isinstance(name, str) and callable(function) for name, function in named):
            raise InvalidArgumentError(
                "variables are functions by name", expected="{name: function, ...}", got=repr(self.variables)[:80]
            )
        if not isinstance(self.output, str) or self.output not in self.variables:
            raise InvalidArgumentError(
                f"the output {self.output!r} is no variable",
                expected=", ".join(self.variables),
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
        fixed = {} if fixed is None else fixed
        for name, given in (("setting", setting), ("fixed", fixed)):
            if not isinstance(given, Mapping):
                raise InvalidArgumentError(f"{name}={given!r}"[:80], expected="values by name")
        self.check(fixed)
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

    def interchange(self, base: Setting, source: Setting, variables: str | Sequence[str]) -> Hashable:
        """Returns the output for the base's inputs, with some variables as they are for the source's.

        Args:
            base: The inputs of the run that is changed.
            source: The inputs of the run that values are taken from.
            variables: Which, one or several; an input can be one of them.
        """
        names = _names(variables)
        self.check(names)
        taken = self.run(source)
        return self.run(base, {name: taken[name] for name in names})[self.output]

    def check(self, names: Iterable[str]) -> None:
        """Raises InvalidArgumentError unless all names are those of inputs or variables."""
        known = (*self.inputs, *self.variables)
        for name in names:
            if name not in known:
                raise InvalidArgumentError(
                    f"{name!r} is neither an input nor a variable",
                    expected=", ".join(known),
                    nearest=nearest(name, known),
                )


def _names(variables: str | Sequence[str]) -> Sequence[str]:
    names = [variables] if isinstance(variables, str) else variables
    if not isinstance(names, Sequence):
        raise InvalidArgumentError(f"variables={variables!r}"[:80], expected="a variable's name, or several")
    return names


def _parameters(name: str, function: Mechanism) -> tuple[str, ...]:
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have none
        found = [inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in found:
        if parameter.kind not in by_name or parameter.default is not inspect.Parameter.empty:
            raise InvalidArgumentError(
                f"the function of {name!r} does not say what it depends on",
                expected="parameters that are names of inputs and variables, without defaults",
                got=str(parameter),
            )
    return tuple(parameter.name for parameter in found)


def draw_interchanges(
    bridge: TransformerBridge,
    model: CausalModel,
    inputs: Sequence[Setting],
    variables: str | Sequence[str],
    *,
    prompt: Prompt,
    token: Callable[[Hashable], str | int] | None = None,
    position: PromptPosition = -1,
    answers: Answers | None = None,
    count: int = 256,
    changing: bool = False,
    seed: int = 0,
) -> InterchangeExamples:
    """Returns random pairs of inputs, with what the causal model puts out when variables are exchanged between them.

    No pair comes twice, and none has one input on both sides. A pair for which the model puts out None is passed over.

    Args:
        bridge: The model that is to be explained.
        model: What explains it.
        inputs: Inputs of the causal model; pairs are made of them.
        variables: The variable that is exchanged, or several; an input can be one.
        prompt: Gives the text, or the token ids, that the model reads for an input; the same kind for all.
        token: Gives the token, as text or id, of an output; None where outputs are tokens.
        position: Where values are exchanged: counted in each prompt's tokens (a BOS is one), negative from the last.
        answers: The tokens among which the likeliest is the answer, as text or ids; None for the whole vocabulary.
        count: Pairs.
        changing: Whether a pair must have another output after the interchange than before. Otherwise some pairs may be
            right without an interchange; the results say how many are.
        seed: Of the pairs. Torch's own seed is neither read nor changed.

    Raises:
        InvalidArgumentError: Fewer than two inputs, too few pairs, or a position that a prompt does not have.
        NoTokenizerError: Text, and the bridge has no tokenizer.

    Example:
        >>> import clearspan
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> model = CausalModel({"answer": lambda module: f" {module}"}, output="answer")
        >>> pairs = draw_interchanges(
        ...     bridge,
        ...     model,
        ...     [{"module": name} for name in ("os", "sys", "re")],
        ...     "module",
        ...     prompt=lambda given: f"import {given['module']}",
        ...     count=6,
        ... )
        >>> pairs
        InterchangeExamples(6 pairs of 3 and 3 tokens, values exchanged at 1 place)
    """
    check_counts(count=count)
    check_counts(0, seed=seed)
    if not isinstance(model, CausalModel):
        raise InvalidArgumentError("this is no CausalModel", got=repr(model)[:80])
    check_bridge(bridge)
    check_flags(changing=changing)
    if not callable(prompt) or not (token is None or callable(token)):
        raise InvalidArgumentError("prompt and token are functions", got=f"prompt={prompt!r}, token={token!r}"[:80])
    if not isinstance(inputs, Sequence) or not all(isinstance(one, Mapping) for one in inputs):
        raise InvalidArgumentError(
            "inputs are settings of the causal model", expected="[{name: value, ...}, ...]", got=repr(inputs)[:80]
        )
    names = _names(variables)
    if not names:
        raise InvalidArgumentError(f"variables={variables!r}", expected="a variable's name, or several")
    model.check(names)
    kept: list[tuple[Setting, Setting, Hashable]] = []
    for base, source in islice(_pairs(inputs, seed), _PATIENCE * count):
        output = model.interchange(base, source, names)
        if output is not None and not (changing and output == model.run(base)[model.output]):
            kept.append((base, source, output))
        if len(kept) == count:
            break
    else:
        raise InvalidArgumentError(
            f"there are too few pairs of {len(inputs)} inputs", expected=f"count={count}", got=str(len(kept))
        )
    bases, sources, outputs = zip(*kept, strict=True)
    return InterchangeExamples.of(
        bridge,
        cast("Input", [_as_input(prompt(each)) for each in bases]),
        cast("Input", [_as_input(prompt(each)) for each in sources]),
        cast("Targets", [_as_token(each if token is None else token(each)) for each in outputs]),
        position=[_places(position, each) for each in bases],
        source_position=[_places(position, each) for each in sources],
        answers=answers,
    )


def _pairs(inputs: Sequence[Setting], seed: int) -> Iterator[tuple[Setting, Setting]]:
    """Yields ordered pairs of two different inputs, each pair once, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    total, seen = len(inputs) * (len(inputs) - 1), set()
    while len(seen) < total:
        for code in torch.randint(total, (1024,), generator=generator).tolist():
            if code not in seen:
                seen.add(code)
                first, other = divmod(code, len(inputs) - 1)
                yield inputs[first], inputs[other + (other >= first)]


def _as_input(given: object) -> object:
    if not isinstance(given, str | list | tuple | Tensor):
        raise InvalidArgumentError(f"the prompt {given!r} cannot be read", expected="text, or token ids")
    return given


def _as_token(output: Hashable) -> str | int:
    if isinstance(output, bool) or not isinstance(output, str | int):
        raise InvalidArgumentError(
            f"the output {output!r} is no token", expected="text of one token, or an id", fix="token=, which gives one"
        )
    return output


def _places(position: PromptPosition, setting: Setting) -> Sequence[int]:
    own = position(setting) if callable(position) else position
    if not isinstance(own, int | list | tuple | range):
        raise InvalidArgumentError(f"{own!r} is no position", expected="a whole number, or several")
    return [own] if isinstance(own, int) else own
