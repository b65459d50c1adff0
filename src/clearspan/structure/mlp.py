"""The parts of plain and gated MLPs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from clearspan.architectures.parts import BranchOptions
from clearspan.components import (
    ActivationBridge,
    GatedMLPBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    MLPBridge,
)
from clearspan.points import Layout
from clearspan.structure.algebra import factor, linear_kind, norm_kind, rounded, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.mixing import MixedError, mixes_between, mixes_positions
from clearspan.structure.templates import linear_template, norm_template
from clearspan.structure.trace import Trace, Visit, fresh_arguments, traced
from clearspan.structure.wiring import Contribution


@dataclass(eq=False)
class Maps:
    """The linear maps of an MLP.

    Attributes:
        whole: The call of the MLP's own module, or the block's where it has none.
        has_module: Whether it has one.
        inward: The maps that read its input, in order.
        outward: The map whose output it is.
        norm: The norm before that, or None.
    """

    whole: Visit
    has_module: bool
    inward: list[Visit]
    outward: Visit
    norm: Visit | None = None

    @property
    def hidden(self) -> Visit:
        """The call that reads the hidden layer: the norm, or the output map."""
        return self.norm or self.outward


def find_mlp(
    trace: Trace,
    block: Visit,
    whole: Visit | None,
    contribution: Contribution,
    outside: Sequence[Visit],
    findings: Findings,
    where: str,
) -> tuple[GeneralizedComponent, Visit]:
    """Returns the template of an MLP or a mixture, and the call that reads its input.

    Args:
        trace: The traced forward.
        block: The block's call.
        whole: The call of the outermost module that adds the contribution, or None where a map alone does.
        contribution: What the sublayer adds.
        outside: Calls of the block outside of its attention.
        findings: Where to say what was found.
        where: The block's canonical path.

    Raises:
        MixedError: Positions mix in it.
        MissingStructureError: It is neither linear maps around an activation function, nor a known mixture.
    """
    inside = trace.inside(whole) if whole is not None else list(outside)
    maps = find_maps(block, whole, inside, contribution)
    if whole is None:
        _check_positions(block, maps)
    names = ", ".join(one.path for one in (*maps.inward, maps.outward))
    findings.add(f"{where}.mlp", f"its maps are {names}")
    return mlp_template(block, maps, inside), maps.whole if maps.has_module else maps.inward[0]


def find_maps(block: Visit, whole: Visit | None, inside: Sequence[Visit], contribution: Contribution) -> Maps:
    """Returns the linear maps of an MLP.

    Args:
        block: The call around it, of a block or a mixture.
        whole: The call of its own module, or None where it has none.
        inside: Calls in that, or in the block.
        contribution: What it adds.

    Raises:
        MissingStructureError: It has no linear maps around something else.
    """
    outs = [one for one in contribution.source if linear_kind(one)]
    if not outs:
        raise MissingStructureError(f"what {block.path} adds besides attention is no linear map's output")
    outward = outs[-1]
    if whole is not None and not outward.is_in(whole.path):
        whole = None
    inner = _kind_inputs(outward)
    linears = [one for one in inside if one.order < outward.order and linear_kind(one)]
    wide = [one for one in linears if one.left is not None and one.left.shape[-1] in (inner, 2 * inner)]
    last = wide[-1:] if wide else []
    inward = [one for one in wide if last and same(one.entered, last[0].entered)][-2:]
    if not inward:
        raise MissingStructureError(f"no linear map of {(whole or block).path} reads its input")
    if whole is None:
        whole = _around(inside, [*inward, outward])
    if whole is not None and not _reads_input(whole, inward[0], inside):
        raise MissingStructureError(f"{inward[0].path} reads neither the input of {whole.path} nor a norm of it")
    norm = next((one for one in inside if same(one.left, outward.entered) and norm_kind(one)), None)
    return Maps(whole or block, whole is not None, inward, outward, norm)


def _check_positions(block: Visit, maps: Maps) -> None:
    """Raises where positions mix in what was taken for an MLP: it is none then, whatever its maps."""
    if maps.has_module:
        if mixes_positions(maps.whole, *block.size):
            raise MixedError(maps.whole)
    elif mixes_between(block, maps.inward, maps.outward, *block.size):
        names = ", ".join(one.path for one in maps.inward)
        raise MissingStructureError(f"positions mix between {names} and {maps.outward.path}")


def _reads_input(whole: Visit, inward: Visit, inside: Sequence[Visit]) -> bool:
    """Whether a map reads a module's input, as it is or through a norm, up to a number."""
    given, read = whole.entered, inward.entered
    if given is None or read is None:
        return False
    norms = (one for one in inside if one.order < inward.order and same(one.entered, given) and norm_kind(one))
    return any(one is not None and factor(one, read) is not None for one in (given, *(norm.left for norm in norms)))


def _around(inside: Sequence[Visit], maps: Sequence[Visit]) -> Visit | None:
    """Returns the call of the innermost module in a block that has all maps, or None: it may add the stream itself."""
    whole = [one for one in inside if one.module._modules and all(each.is_in(one.path) for each in maps)]
    return max(whole, key=lambda one: one.depth) if whole else None


def _kind_inputs(visit: Visit) -> int:
    kind = linear_kind(visit)
    assert kind is not None, "found as a linear map"
    return kind.inputs


def mlp_template(block: Visit, maps: Maps, inside: Sequence[Visit]) -> MLPBridge:
    """Returns the template of an MLP in a block or a mixture.

    Raises:
        MissingStructureError: None of two maps, or halves of a map, is a linear branch.
    """
    around = maps.whole.path
    layout = Layout.FLAT if maps.outward.left is not None and maps.outward.left.ndim == 2 else Layout.TOKENS

    def part(visit: Visit) -> GeneralizedComponent:
        return linear_template(visit, visit.path.removeprefix(f"{around}."), layout)

    make, keys = _kind(maps)
    parts: dict[str, GeneralizedComponent] = {
        **{key: part(one) for key, one in zip(keys, maps.inward, strict=True)},
        "out": part(maps.outward),
    }
    if maps.norm is not None:
        parts["norm"] = norm_template(maps.norm, maps.norm.path.removeprefix(f"{around}."), layout, 0)
    name = maps.whole.path.removeprefix(f"{block.path}.") if maps.has_module else None
    if name is None:
        act = next((one for one in inside if same(one.entered, maps.inward[0].left) and not linear_kind(one)), None)
        if act is not None and act.order < maps.outward.order:
            parts["act"] = ActivationBridge(name=act.path.removeprefix(f"{around}."), layout=layout)
    ends = layout_of(maps.whole.entered) if name else Layout.TOKENS
    template = make(name=name, submodules=parts, layout=ends)
    template.output_is_overwritten = maps.has_module and maps.whole.is_overwritten
    parts["out"].output_is_overwritten = maps.outward.is_overwritten
    return template


def _kind(maps: Maps) -> tuple[Callable[..., MLPBridge], list[str]]:
    """Returns what makes an MLP's template, and what its inward maps are called."""
    if len(maps.inward) == 2:
        branches = [_branch(maps, one) for one in maps.inward]
        linear = [index for index, one in enumerate(branches) if one is not None]
        if len(linear) != 1:
            raise MissingStructureError(f"which map of {maps.whole.path} is the gate")
        keys = ["in", "gate"] if linear == [0] else ["gate", "in"]
        return partial(GatedMLPBridge, **(branches[linear[0]] or {})), keys
    (only,) = maps.inward
    width = _kind_inputs(maps.outward)
    if not _is_all(maps, only):
        raise MissingStructureError(f"{only.path} gives a part alone of what {maps.outward.path} is given")
    if only.left is None or only.left.shape[-1] != 2 * width:
        return MLPBridge, ["in"]
    branches = [_branch(maps, only, slice(start, start + width)) for start in (0, width)]
    linear = [index for index, one in enumerate(branches) if one is not None]
    if len(linear) != 1:
        raise MissingStructureError(f"which half of {only.path} is the gate")
    return partial(JointGateMLPBridge, **(branches[linear[0]] or {}), gate_is_second=linear == [0]), ["gate_up"]


def _is_all(maps: Maps, only: Visit) -> bool:
    """Whether the output map's input is the same for all tokens when a map's output is: nothing else makes it."""
    hidden = _hidden(maps, only, slice(None), 0.0).flatten(0, -2)
    return same(hidden, hidden[:1].expand_as(hidden).clone())


NEAR, FAR = 0.5, 1000.0
"""Values of a linear branch: under any limit that a model sets, and far over it."""


def _branch(maps: Maps, one: Visit, channels: slice = slice(None)) -> BranchOptions | None:
    """Returns what a map's output is like as a linear branch; None where the hidden layer is not linear in it.

    Args:
        maps: The MLP's maps.
        one: The call of the map.
        channels: Those of its output.
    """
    low, middle, high = (_hidden(maps, one, channels, value) for value in (-NEAR, 0.0, NEAR))
    slope = (high - low) / (2 * NEAR)
    offset = factor(slope, middle)
    if offset is None or not same(middle - low, high - middle) or not bool(slope.any()):
        return None
    most, least = (factor(slope, _hidden(maps, one, channels, value)) for value in (FAR, -FAR))
    if most is None or least is None:
        return None
    limits = [rounded(most - offset), rounded(offset - least)]
    if limits[0] != limits[1]:
        return None
    found: BranchOptions = {}
    if limits[0] < FAR / 2:
        found["linear_limit"] = limits[0]
    if offset:
        found["linear_offset"] = offset
    return found


def _hidden(maps: Maps, one: Visit, channels: slice, value: float) -> Tensor:
    """Returns what the output map, or its norm, reads when some channels of a map's output have a value."""
    whole, path = maps.whole, f"{maps.whole.path}."

    def changed(left: Tensor) -> Tensor:
        new = left.clone()
        new[..., channels] = value
        return new

    args, kwargs = fresh_arguments(whole)
    again = traced(whole.module, lambda: whole.module(*args, **kwargs), {one.path.removeprefix(path): changed})
    entered = next(visit.entered for visit in again.visits if visit.path == maps.hidden.path.removeprefix(path))
    assert entered is not None, "a linear map takes a tensor"
    return entered


def layout_of(value: Tensor | None) -> Layout:
    """Returns how rows and positions lie in a tensor."""
    return Layout.FLAT if value is not None and value.ndim == 2 else Layout.TOKENS
