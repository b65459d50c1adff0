"""A cache as text: its names, axes with sizes, and bytes."""

from typing import TYPE_CHECKING

from clearspan.results import table

if TYPE_CHECKING:
    from clearspan.bridge.cache import ActivationCache

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def described(cache: "ActivationCache") -> str:
    """Returns a table of a cache's entries; layers that have the same are one row."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name in cache:
        path, layer = template_of(name)
        shown = ", ".join(
            axis if size is None or axis == "1" else f"{axis} {size}" for axis, size in cache.axes_of(name).items()
        )
        rows.setdefault((path, f"[{shown}]"), []).extend([] if layer is None else [layer])
    lines = table(["name", "layers", "axes"], [[path, layer_ranges(at), shape] for (path, shape), at in rows.items()])
    sizes = ", ".join(f"{axis} {size}" for axis, size in (cache.sizes if rows else {}).items())
    heading = f"ActivationCache: {len(cache)} entries, {bytes_as_text(cache.nbytes)} kept"
    return "\n".join([f"{heading}; {sizes}" if sizes else heading, *lines])


def template_of(name: str) -> tuple[str, int | None]:
    """Returns a name with `{l}` for its layer, and the layer.

    Example:
        >>> template_of("blocks.3.attn.hook_q")
        ('blocks.{l}.attn.hook_q', 3)
    """
    head, _, rest = name.partition(".")
    layer, _, tail = rest.partition(".")
    return (f"{head}.{{l}}.{tail}", int(layer)) if head == "blocks" and layer.isdigit() else (name, None)


def layer_ranges(layers: list[int]) -> str:
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
            return f"{count:z.0f} {unit}" if unit == "B" else f"{count:z.1f} {unit}"
        count /= 1024
    return f"{count:z.1f} {UNITS[-1]}"
