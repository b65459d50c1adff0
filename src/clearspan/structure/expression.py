"""Expressions of Python: values that know how they are written, on one line or, where that is too long, on several.

What is too long for a line has one element a line, with a comma after the last: formatters leave that as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

WIDTH = 120
"""Columns of a line."""
INDENT = 4


@dataclass(frozen=True)
class Code:
    """An expression that is written as it is, such as `cfg.n_heads`.

    Attributes:
        text: The expression.
        value: What it is.
        home: The module that it is imported from, if it is a name that needs that.
    """

    text: str
    value: object
    home: str = ""


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        function: What is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    function: Callable[..., object]
    args: Sequence["Expression"] = ()
    kwargs: Mapping[str, "Expression"] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the function is called by."""
        return self.function.__name__


Expression = Code | Call | Sequence["Expression"] | Mapping[str, "Expression"] | Enum | str | float | None


def value_of(one: Expression) -> object:
    """Returns what an expression evaluates to."""
    match one:
        case Code():
            return one.value
        case Call():
            args = [value_of(arg) for arg in one.args]
            return one.function(*args, **{key: value_of(arg) for key, arg in one.kwargs.items()})
        case Mapping():
            return {key: value_of(part) for key, part in one.items()}
        case str():
            return one
        case Sequence():
            parts = [value_of(part) for part in one]
            return tuple(parts) if isinstance(one, tuple) else parts
        case _:
            return one


def written(one: Expression, indent: int = 0, before: int = 0, after: int = 0) -> str:
    """Returns the text of an expression.

    Args:
        one: The expression.
        indent: Columns before the line that it begins on.
        before: Columns of that line before it, besides those.
        after: Columns of its last line after it.

    Example:
        >>> written(Call(sum, [Code("cfg.n_heads", 4)], {"start": ("a",)}))
        'sum(cfg.n_heads, start=("a",))'
    """
    flat = _flat(one)
    if indent + before + len(flat) + after <= WIDTH or not _parts(one):
        return flat
    start, end = _brackets(one)
    pad = " " * (indent + INDENT)
    lines = [f"{pad}{prefix}{written(part, indent + INDENT, len(prefix), 1)}," for prefix, part in _parts(one)]
    return "\n".join([start, *lines, " " * indent + end])


def _flat(one: Expression) -> str:
    match one:
        case Code():
            return one.text
        case Enum():
            return f"{type(one).__name__}.{one.name}"
        case str():
            return f'"{one}"'
        case bool() | int() | float() | None:
            return repr(one)
        case _:
            start, end = _brackets(one)
            inside = ", ".join(prefix + _flat(part) for prefix, part in _parts(one))
            comma = "," if isinstance(one, tuple) and len(one) == 1 else ""
            return f"{start}{inside}{comma}{end}"


def _brackets(one: Expression) -> tuple[str, str]:
    match one:
        case Call():
            return f"{one.name}(", ")"
        case Mapping():
            return "{", "}"
        case tuple():
            return "(", ")"
        case _:
            return "[", "]"


def _parts(one: Expression) -> list[tuple[str, Expression]]:
    """Returns what lies between an expression's brackets, each with what is written before it."""
    match one:
        case Call():
            return [*(("", arg) for arg in one.args), *((f"{key}=", arg) for key, arg in one.kwargs.items())]
        case Mapping():
            return [(f'"{key}": ', part) for key, part in one.items()]
        case str() | Code() | Enum():
            return []
        case Sequence():
            return [("", part) for part in one]
        case _:
            return []


def names_in(one: Expression) -> Iterator[tuple[str, str]]:
    """Yields what an expression has to import, each with the module that has it."""
    match one:
        case Code(text=text, home=home) if home:
            yield home, text
        case Call():
            yield one.function.__module__, one.name
        case Enum():
            yield type(one).__module__, type(one).__name__
        case _:
            pass
    for _, part in _parts(one):
        yield from names_in(part)
