"""Attention's modules: those that give queries, keys and values, and those that take what the heads found."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clearspan.structure.algebra import as_tokens, linear_kind, norm_kind, same
from clearspan.structure.finding import MissingStructureError
from clearspan.structure.gate import Gate, find_gate
from clearspan.structure.latent import Low, find_low
from clearspan.structure.projected import Projected, find_projected
from clearspan.structure.shared_keys import find_source, told_apart
from clearspan.structure.trace import Attended, Trace, Visit


@dataclass(eq=False)
class Attention:
    """What was found of a layer's attention.

    Attributes:
        attended: The product of queries and keys.
        query: Where queries come from.
        key: Where keys come from.
        value: Where values come from.
        output: The output projection's call.
        gate: What multiplies z before it, or None.
        o_norm: The call of the norm of z before it, or None.
        path: Path of the module with all of these.
        lows: The maps and norms before a projection's own map, where that reads a latent.
        source: The layer whose keys and values it uses, where it has none of its own: they come from there.
    """

    attended: Attended
    query: Projected
    key: Projected
    value: Projected
    output: Visit
    path: str
    gate: Gate | None = None
    o_norm: Visit | None = None
    lows: tuple[Low, ...] = ()
    source: int | None = None

    @property
    def reader(self) -> Visit:
        """The call of the first map of queries."""
        return next((one.map for one in self.lows if one.reader is self.query.map), self.query.map)


def find_attention(trace: Trace, block: Visit, attended: Attended) -> Attention:
    """Returns the modules of one attention in a block.

    Raises:
        MissingStructureError: Heads' outputs reach the output projection changed, or projections are no linear maps.
    """
    rows, positions, _ = _shape(block)
    inside = trace.inside(block)
    output, gate, o_norm = _output(inside, attended, rows, positions)
    earlier = [one for one in inside if one.order < output.order]
    source = find_source(trace, block, attended)
    if source is not None:
        query = find_projected("queries", attended.query, earlier, rows, positions)
        there = find_attention(trace, source.block, source.attended)
        paths = [attended.path, output.path, query.map.path, *([] if gate is None else [gate.map.path])]
        around = _around(paths, block.path)
        return Attention(attended, query, there.key, there.value, output, around, gate, o_norm, source=source.layer)
    query, key, value = (
        find_projected(name, heads, earlier, rows, positions)
        for name, heads in (("queries", attended.query), ("keys", attended.key), ("values", attended.value))
    )
    if value.is_turned or value.is_scaled:
        raise MissingStructureError(f"positions change the values of {attended.path}")
    key, value = told_apart(trace, attended, earlier, key, value)
    paths = [attended.path, output.path, *(one.map.path for one in (query, key, value))]
    paths += [] if gate is None else [gate.map.path]
    lows = tuple(one for one in (find_low(one.map, earlier) for one in (query, value)) if one is not None)
    return Attention(attended, query, key, value, output, _around(paths, block.path), gate, o_norm, lows)


def _shape(block: Visit) -> tuple[int, int, int]:
    assert block.entered is not None, "a block reads the stream"
    rows, positions, width = block.entered.shape
    return rows, positions, width


def _around(paths: Sequence[str], outermost: str) -> str:
    """Returns the path of the innermost module that has all of these in it."""
    parts = [path.split(".") for path in paths]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    path = ".".join(common)
    if path == outermost or not path.startswith(outermost):
        raise MissingStructureError(f"attention in {outermost} has no module of its own")
    return path


def _output(
    inside: Sequence[Visit], attended: Attended, rows: int, positions: int
) -> tuple[Visit, Gate | None, Visit | None]:
    """Returns the output projection's call, and the gate or the norm between z and it."""
    z = attended.result.reshape(rows, positions, -1)
    later = [one for one in inside if one.order > attended.order and linear_kind(one)]
    norms = [one for one in inside if norm_kind(one) and same(_tokens(one.entered, rows, positions), z)]
    for call in later:
        entered = _tokens(call.entered, rows, positions)
        if entered is None or entered.shape != z.shape:
            continue
        if same(entered, z):
            return call, None, None
        norm = next((one for one in norms if same(call.entered, one.left)), None)
        if norm is not None:
            return call, None, norm
    for call in later:
        entered = _tokens(call.entered, rows, positions)
        if entered is not None and entered.shape == z.shape:
            gate = find_gate(inside, entered, attended, rows, positions)
            if gate is not None:
                return call, gate, None
    raise MissingStructureError(
        f"what the heads of {attended.path} found reaches no linear map as it is, gated, or normed"
    )


def _tokens(value: Tensor | None, rows: int, positions: int) -> Tensor | None:
    return None if value is None else as_tokens(value, rows, positions)
