"""The imports of an adapter's text."""

from collections.abc import Iterable, Iterator

from clearspan.structure.expression import WIDTH, Expression, names_in

_PUBLIC = ("clearspan.components.mixer_kinds", "clearspan.components", "clearspan.conversions", "clearspan.points")


def imports_of(used: Iterable[Expression]) -> Iterator[str]:
    """Yields the imports of a module's names, in their order."""
    found: dict[str, set[str]] = {
        "clearspan.architectures": {"ArchitectureAdapter", "Sizes"},
        "clearspan.components": {"GeneralizedComponent"},
        "clearspan.config": {"TransformerBridgeConfig"},
    }
    for one in used:
        for module, name in names_in(one):
            found.setdefault(_home(module), set()).add(name)
    yield "from collections.abc import Mapping"
    yield "from typing import ClassVar"
    yield ""
    yield "import clearspan"
    for module in sorted(found):
        yield _import(module, sorted(found[module], key=_order))


def _home(module: str) -> str:
    if module.startswith("clearspan.architectures.adapter"):
        return "clearspan.architectures"
    return next((one for one in _PUBLIC if module.startswith(one)), module)


def _order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _import(module: str, names: list[str]) -> str:
    flat = f"from {module} import {', '.join(names)}"
    return (
        flat if len(flat) <= WIDTH else "\n".join([f"from {module} import (", *(f"    {one}," for one in names), ")"])
    )
