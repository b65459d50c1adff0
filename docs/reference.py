"""Writes the API reference: a page for each public module, with every public name, from the docstrings.

python docs/reference.py
"""

import inspect
import re
import types
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path

import clearspan
from clearspan.errors import ClearspanError

FOLDER = Path(__file__).parent / "reference"
MODULES = ("clearspan", *(f"clearspan.{name}" for name in clearspan._MODULES))
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|References):$")


def pages() -> dict[str, str]:
    """Returns the text of each page, by its file's name."""
    found = {f"{name.removeprefix('clearspan.')}.md": page(name) for name in MODULES}
    index = [
        "# Reference",
        "",
        "Every public name, from the docstrings. `python docs/reference.py` writes these pages.",
        "",
    ]
    for name in MODULES:
        summary = (import_module(name).__doc__ or "").splitlines()[0]
        index.append(f"- [`{name}`]({name.removeprefix('clearspan.')}.md): {summary}")
    return {"README.md": "\n".join(index) + "\n", **found}


def public_names(module: str) -> list[str]:
    """Returns the names that a module offers, without its modules."""
    home = import_module(module)
    return [
        name for name in sorted(home.__all__, key=str.lower) if not isinstance(getattr(home, name), types.ModuleType)
    ]


def page(module: str) -> str:
    """Returns the page of one module."""
    home = import_module(module)
    lines = [f"# `{module}`", "", *_body(inspect.getdoc(home) or ""), ""]
    for name in public_names(module):
        value = getattr(home, name)
        first = next(one for one in MODULES if name in public_names(one))
        if first == module:
            lines += [*entry(name, value), ""]
        else:
            lines += [f"## `{name}`", "", f"See [`{first}`]({first.removeprefix('clearspan.')}.md).", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def entry(name: str, value: object) -> Iterator[str]:
    """Yields the lines of one name."""
    yield f"## `{name}`"
    yield ""
    if inspect.isclass(value):
        yield from _class(name, value)
    elif isinstance(value, types.FunctionType):
        yield from _signature(name, value)
        yield from _body(inspect.getdoc(value) or "")
    else:
        yield from (f"```python\n{name} = {_type_of(value)}\n```",)


def _class(name: str, value: type) -> Iterator[str]:
    is_error = issubclass(value, ClearspanError)
    if not is_error and not inspect.isabstract(value):
        yield from _signature(name, value)
    if is_error:
        yield f"`{name}({', '.join(base.__name__ for base in value.__bases__)})`"
        yield ""
    yield from _body(inspect.getdoc(value) or "")
    inherited: dict[type, list[str]] = {}
    for base, own, member in _members(value):
        if _shown_at(base) is not value:
            inherited.setdefault(base, []).append(f"`{own}`")
            continue
        yield f"### `{name}.{own}`"
        yield ""
        if isinstance(member, property):
            yield from _body(inspect.getdoc(member) or "")
        else:
            yield from _signature(own, member)
            yield from _body(inspect.getdoc(member) or "")
    for base, names in inherited.items():
        yield f"As in `{_shown_at(base).__name__}`: {', '.join(names)}."
        yield ""


@cache
def _shown_at(base: type) -> type:
    """Returns the public class that shows a class's members: itself, or else the first that inherits them."""
    classes = [getattr(import_module(module), name) for module in MODULES for name in public_names(module)]
    classes = [one for one in classes if inspect.isclass(one) and base in one.__mro__]
    return base if base in classes else classes[0]


def _members(value: type) -> Iterator[tuple[type, str, object]]:
    """Yields the public methods and properties of a class, those of its bases in clearspan too, with the base."""
    seen: set[str] = set()
    for base in value.__mro__:
        if not base.__module__.startswith("clearspan") or base is ClearspanError:
            continue
        for own, raw in vars(base).items():
            member = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
            is_property = isinstance(member, cached_property) or type(member).__name__ == "Weight"
            is_ours = isinstance(member, property | types.FunctionType) or is_property
            if own.startswith("_") or own in seen or not is_ours:
                continue
            seen.add(own)
            yield (
                base,
                own,
                member if isinstance(member, property | types.FunctionType) else property(doc=member.__doc__),
            )


def _signature(name: str, value: object) -> Iterator[str]:
    try:
        signature = inspect.signature(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return
    parameters = [_parameter(one) for one in signature.parameters.values() if one.name not in ("self", "cls")]
    yield "```python"
    line = f"{name}({', '.join(parameters)})"
    if len(line) <= 100:
        yield line
    else:
        yield f"{name}("
        kind = None
        for text, parameter in zip(
            parameters, [p for p in signature.parameters.values() if p.name not in ("self", "cls")], strict=True
        ):
            if parameter.kind is parameter.KEYWORD_ONLY and kind not in (
                parameter.KEYWORD_ONLY,
                parameter.VAR_POSITIONAL,
            ):
                yield "    *,"
            kind = parameter.kind
            yield f"    {text},"
        yield ")"
    yield "```"
    yield ""


def _parameter(parameter: inspect.Parameter) -> str:
    shown = _plain(str(parameter.replace(default=inspect.Parameter.empty)))
    if parameter.default is inspect.Parameter.empty:
        return shown
    default = repr(parameter.default)
    return f"{shown} = {'...' if default.startswith('<') else default}"


def _plain(text: str) -> str:
    """Returns a parameter without the paths of modules."""
    text = re.sub(r"\b(?:clearspan|torch|collections\.abc|typing|jaxtyping|pathlib|numpy)\.(?:\w+\.)*", "", text)
    return text.replace("'", "")


def _type_of(value: object) -> str:
    return _plain(str(value)) if len(str(value)) < 300 else "..."


def _body(doc: str) -> Iterator[str]:
    """Yields a docstring as Markdown: its sections as headings in bold, their entries as lists, examples as code."""
    section = None
    lines = doc.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        found = _SECTION.match(line)
        if found:
            section = found[1]
            yield ""
            yield f"**{section}**"
            yield ""
        elif section in ("Args", "Attributes", "Raises") and re.match(r"^    \S", line):
            text = [line.strip()]
            while number + 1 < len(lines) and re.match(r"^ {5,}\S", lines[number + 1]):
                number += 1
                text.append(lines[number].strip())
            head, _, rest = " ".join(text).partition(": ")
            yield f"- `{head}`: {rest}" if rest else f"- {head}"
        elif line.strip().startswith(">>>") and section == "Example":
            yield "```python"
            while number < len(lines) and lines[number].strip():
                yield lines[number].removeprefix("    ")
                number += 1
            yield "```"
        else:
            yield line.removeprefix("    ") if section else line
        number += 1
    yield ""


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
