"""Views: requests as data, checked, and the one call of the library that answers each.

A view is computed and written as Python from the same `Call`, so that both give the same numbers. Nothing here knows of
threads, files or the network.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_fields, check_kind, wholes
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Intervention


@dataclass(frozen=True)
class Prompt:
    """Token ids of one row. The text that they were is shown, and not read."""

    tokens: tuple[int, ...]
    text: str = ""

    def __post_init__(self) -> None:
        tokens = wholes(self.tokens)
        if not tokens or isinstance(self.tokens, int):
            raise InvalidArgumentError("a prompt has token ids", expected="[0, 5, ...]", got=repr(self.tokens)[:80])
        object.__setattr__(self, "tokens", tokens)
        check_kind(str, text=self.text)

    @property
    def rows(self) -> list[list[int]]:
        """As an input of the library."""
        return [list(self.tokens)]


@dataclass(frozen=True)
class Answer:
    """What a view shows.

    Attributes:
        facts: Plain data, for JSON.
        tensors: By name, on the CPU.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Watch(Protocol):
    """Who follows a view while it is computed."""

    @property
    def begun(self) -> Answer | None:
        """What was shown last when the same view was broken off earlier."""

    def tell(self, stage: str, done: int, total: int) -> None:
        """Says how far it is; raises where it was cancelled."""

    def show(self, answer: Answer) -> None:
        """Shows, and keeps, what is there so far."""


@dataclass(frozen=True)
class Call:
    """One call of the library: `name = home.function(bridge, *prompts, *arguments, **keywords)`.

    Attributes:
        home: Where the function is public.
        function: What is called.
        prompts: By the variable's name in the script.
        arguments: What follows them; each has a `repr` that is Python.
        keywords: The rest.
    """

    home: str
    function: Callable[..., Any]
    prompts: Mapping[str, Prompt]
    arguments: Sequence[object] = ()
    keywords: Mapping[str, object] = field(default_factory=dict)

    def of(self, bridge: TransformerBridge) -> Any:
        """Returns what the function returns."""
        rows = (prompt.rows for prompt in self.prompts.values())
        return self.function(bridge, *rows, *self.arguments, **self.keywords)

    def python(self) -> str:
        """Returns the call as Python."""
        given = [
            "bridge",
            *self.prompts,
            *(_python(one) for one in self.arguments),
            *(f"{name}={_python(value)}" for name, value in self.keywords.items()),
        ]
        return f"{self.home}.{self.function.__name__}({', '.join(given)})"


def _python(value: object) -> str:
    """Returns a value as Python, with the module of what is no plain data."""
    match value:
        case tuple() if any(isinstance(one, Intervention) for one in value):
            return made_of(value)
        case str() | int() | float() | None | tuple() | list():
            return repr(value)
    home = type(value).__module__.split(".")[1]  # of a metric: clearspan.sweep
    return f"clearspan.{home}.{value!r}"


def made_of(interventions: Sequence[Intervention]) -> str:
    """Returns interventions as Python."""
    return f"[{', '.join(f'clearspan.Intervention.from_json({one.to_json()!r})' for one in interventions)}]"


def made_in(interventions: Sequence[Intervention], run: str) -> list[str]:
    """Returns a line of Python under interventions."""
    if not interventions:
        return [run]
    return [f"with bridge.hooks(interventions={made_of(interventions)}):", f"    {run}"]


@dataclass(frozen=True)
class View(ABC):
    """A request, as data: frozen, with a JSON form. Subclasses are its kinds, in `KINDS`."""

    kind: ClassVar[str]

    @abstractmethod
    def run(self, bridge: TransformerBridge, watch: Watch) -> Answer:
        """Returns what the view shows."""

    @abstractmethod
    def lines(self) -> list[str]:
        """Returns the Python that computes it on a `bridge`, as `found`."""

    def script(self, model: str) -> str:
        """Returns a program that computes and prints the view's numbers.

        Args:
            model: What was booted.
        """
        return "\n".join(["import clearspan", "", f"bridge = clearspan.boot({model!r})", *self.lines(), ""])

    def to_json(self) -> dict[str, Any]:
        """Returns the request as plain data; `view` is its kind."""
        return {"view": self.kind, **{one.name: _plain(getattr(self, one.name)) for one in fields(self)}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns the request of its JSON form, without `view`.

        Raises:
            InvalidArgumentError: A field is unknown, lacks, or has a value that it cannot have.
        """
        known = {one.name for one in fields(cls)}
        needed = {one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING}
        if not needed <= data.keys() <= known:
            raise InvalidArgumentError(
                f"this is no request for {cls.kind}",
                expected=", ".join(sorted(needed)) + f"; and any of {', '.join(sorted(known - needed))}",
                got=", ".join(map(repr, data)),
            )
        try:
            return cls(**{name: _parsed(name, value) for name, value in data.items()})
        except (AttributeError, KeyError, TypeError) as error:  # of places and actions whose fields are something else
            raise InvalidArgumentError(f"this is no request for {cls.kind}", reason=str(error)[:200]) from error


def _parsed(name: str, value: Any) -> Any:
    match name:
        case "prompt" | "clean" | "corrupted":
            check_kind(Mapping, **{name: value})
            check_fields("prompt", value, "tokens", "text")
            return Prompt(**value)
        case "interventions":
            check_kind(list, interventions=value)
            return tuple(map(Intervention.from_json, value))
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    match value:
        case Prompt(tokens, text):
            return {"tokens": list(tokens), "text": text}
        case Intervention():
            return value.to_json()
        case tuple():
            return list(map(_plain, value))
    return value


def prompt_lines(prompts: Mapping[str, Prompt]) -> list[str]:
    """Returns prompts as Python variables, each with its text next to it."""
    return [
        f"{name} = {prompt.rows}" + (f"  # {prompt.text!r}" if prompt.text else "") for name, prompt in prompts.items()
    ]


@dataclass(frozen=True)
class OneText(View):
    """A view of one text, by one call of the library, with interventions made in the run."""

    prompt: Prompt
    interventions: tuple[Intervention, ...] = field(default=(), kw_only=True)

    @abstractmethod
    def call(self) -> Call:
        """Returns the call that answers it."""

    @abstractmethod
    def answer(self, found: Any, bridge: TransformerBridge) -> Answer:
        """Returns what was found as it is shown."""

    def run(self, bridge: TransformerBridge, watch: Watch) -> Answer:
        """Returns what the view shows."""
        watch.tell(self.kind, 0, 1)
        with bridge.hooks(interventions=self.interventions):
            found = self.call().of(bridge)
        return self.answer(found, bridge)

    def lines(self) -> list[str]:
        """Returns the Python that computes it."""
        run = made_in(self.interventions, f"found = {self.call().python()}")
        return [*prompt_lines({"prompt": self.prompt}), *run, "print(found)"]


def named(words: Mapping[int, str]) -> dict[str, str]:
    """Returns the texts of tokens by id, for JSON."""
    return {str(token): word for token, word in words.items()}
