"""A cache as text: its names, axes with sizes, and bytes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from clearspan.points import HookPoint
from clearspan.results import table

if TYPE_CHECKING:
    from clearspan.bridge.cache import ActivationCache

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def described(cache: "ActivationCache", points: Mapping[str, HookPoint]) -> str:
    """Returns a table of a cache's entries; layers that have the same are one row."""
    axes = cache.rows_and_positions() if any(True for _ in cache) else {}
    rows: dict[tuple[str, str], list[int]] = {}
    for name in cache:
        point = points.get(name.removesuffix("_grad"))
        shape = "" if point is None else _shape(cache, point, axes)
        path, layer = _template(name)
        rows.setdefault((path, shape), []).extend([] if layer is None else [layer])
    lines = table(["name", "layers", "axes"], [[path, _ranges(at), shape] for (path, shape), at in rows.items()])
    where = ", ".join(f"{axis} {size}" for axis, size in axes.items())
    return "\n".join([f"ActivationCache: {len(cache)} entries, {bytes_as_text(cache.nbytes)} kept; {where}", *lines])


def _template(name: str) -> tuple[str, int | None]:
    head, _, rest = name.partition(".")
    layer, _, tail = rest.partition(".")
    return (f"{head}.{{l}}.{tail}", int(layer)) if head == "blocks" and layer.isdigit() else (name, None)


def _shape(cache: "ActivationCache", point: HookPoint, axes: Mapping[str, int]) -> str:
    known = {**point.sizes, **axes, **({"q_pos": axes["pos"]} if "pos" in axes else {})}
    left_out = set() if cache.has_batch_dim else {"batch"}
    left_out |= set() if cache.has_positions else {"pos", "q_pos"}
    shown = [axis for axis in point.axes if axis not in left_out]
    return f"[{', '.join(axis if axis not in known or axis == '1' else f'{axis} {known[axis]}' for axis in shown)}]"


def _ranges(layers: list[int]) -> str:
    """Returns layers as text, such as `0-3, 5`."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def bytes_as_text(count: float) -> str:
    """Returns a number of bytes in the unit in which it is easy to read.

    Example:
        >>> bytes_as_text(3 * 2**20)
        '3.0 MiB'
    """
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"
