"""The other sublayers' parts: plain and gated MLPs, and mixtures of experts."""

from collections.abc import Sequence
from dataclasses import dataclass

from clearspan.components import (
    ActivationBridge,
    ExpertsBridge,
    GatedMLPBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    MLPBridge,
    MoEBridge,
    RouterBridge,
)
from clearspan.points import Layout
from clearspan.structure.algebra import linear_kind, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.templates import linear_template
from clearspan.structure.trace import Trace, Visit, fresh_arguments, traced
from clearspan.structure.wiring import Contribution


@dataclass(eq=False)
class _Maps:
    """The linear maps of an MLP.

    Attributes:
        whole: The call of the MLP's own module, or the block's where it has none.
        has_module: Whether it has one.
        inward: The maps that read its input, in order.
        outward: The map whose output it is.
    """

    whole: Visit
    has_module: bool
    inward: list[Visit]
    outward: Visit


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
        MissingStructureError: It is neither linear maps around an activation function, nor a known mixture.
    """
    inside = trace.inside(whole) if whole is not None else list(outside)
    if whole is not None and any(_is_mixture(one) for one in inside):
        return _mixture(block, whole, inside, findings, where), whole
    maps = _maps(block, whole, inside, contribution)
    names = ", ".join(one.path for one in (*maps.inward, maps.outward))
    findings.add(f"{where}.mlp", f"its maps are {names}")
    return _template(block, maps, inside), maps.whole if maps.has_module else maps.inward[0]


def _maps(block: Visit, whole: Visit | None, inside: Sequence[Visit], contribution: Contribution) -> _Maps:
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
    return _Maps(whole or block, whole is not None, inward, outward)


def _around(inside: Sequence[Visit], maps: Sequence[Visit]) -> Visit | None:
    """Returns the call of the innermost module in a block that has all maps, or None: it may add the stream itself."""
    whole = [one for one in inside if one.module._modules and all(each.is_in(one.path) for each in maps)]
    return max(whole, key=lambda one: one.depth) if whole else None


def _kind_inputs(visit: Visit) -> int:
    kind = linear_kind(visit)
    assert kind is not None, "found as a linear map"
    return kind.inputs


def _template(block: Visit, maps: _Maps, inside: Sequence[Visit]) -> MLPBridge:
    around = maps.whole.path
    layout = Layout.FLAT if maps.outward.left is not None and maps.outward.left.ndim == 2 else Layout.TOKENS

    def part(visit: Visit) -> GeneralizedComponent:
        return linear_template(visit, visit.path.removeprefix(f"{around}."), layout)

    kind, keys = _keys(maps)
    parts: dict[str, GeneralizedComponent] = {
        **{key: part(one) for key, one in zip(keys, maps.inward, strict=True)},
        "out": part(maps.outward),
    }
    name = maps.whole.path.removeprefix(f"{block.path}.") if maps.has_module else None
    if name is None:
        act = next((one for one in inside if same(one.entered, maps.inward[0].left) and not linear_kind(one)), None)
        if act is not None and act.order < maps.outward.order:
            parts["act"] = ActivationBridge(name=act.path.removeprefix(f"{around}."), layout=layout)
    template = kind(name=name, submodules=parts)
    template.output_is_overwritten = maps.has_module and maps.whole.is_overwritten
    parts["out"].output_is_overwritten = maps.outward.is_overwritten
    return template


def _keys(maps: _Maps) -> tuple[type[MLPBridge], list[str]]:
    """Returns the kind of an MLP, and what its inward maps are called."""
    if len(maps.inward) == 2:
        first, second = (_is_linear_in(maps, one) for one in maps.inward)
        if first == second:
            raise MissingStructureError(f"which map of {maps.whole.path} is the gate")
        return GatedMLPBridge, ["in", "gate"] if first else ["gate", "in"]
    (only,) = maps.inward
    assert only.left is not None, "calls without an output are left out"
    if only.left.shape[-1] == 2 * _kind_inputs(maps.outward):
        return JointGateMLPBridge, ["gate_up"]
    return MLPBridge, ["in"]


def _is_linear_in(maps: _Maps, one: Visit) -> bool:
    """Whether the output map's input doubles when a map's output does: the linear branch, and not the gate."""
    whole = maps.whole

    args, kwargs = fresh_arguments(whole)
    inner = one.path.removeprefix(f"{whole.path}.")
    changed = traced(whole.module, lambda: whole.module(*args, **kwargs), {inner: lambda value: value * 2})
    again = next(visit for visit in changed.visits if visit.path == maps.outward.path.removeprefix(f"{whole.path}."))
    return maps.outward.entered is not None and same(again.entered, maps.outward.entered * 2)


def _is_mixture(visit: Visit) -> bool:
    """Whether a module holds the weights of several experts in one tensor."""
    return any(one is not None and one.ndim == 3 for one in visit.module._parameters.values())


def _mixture(
    block: Visit, whole: Visit, inside: Sequence[Visit], findings: Findings, where: str
) -> GeneralizedComponent:
    experts = next(one for one in inside if _is_mixture(one))
    routers = [one for one in inside if one.n_returned == 3 and one.returned is tuple and "top_k" in vars(one.module)]
    name = whole.path.removeprefix(f"{block.path}.")
    if not routers or "gate_up_proj" not in experts.module._parameters:
        raise MissingStructureError(f"the router of {whole.path} hands over no choice of experts")
    router = routers[0]
    weight = experts.module._parameters["gate_up_proj"]
    down = experts.module._parameters["down_proj"]
    assert weight is not None, "asked above"
    assert down is not None, "experts have both"
    width = 0 if whole.entered is None else whole.entered.shape[-1]
    is_transposed = weight.shape[-2] == width and down.shape[-1] == width and weight.shape[-1] != width
    findings.add(f"{where}.mlp", f"a mixture: {router.path} chooses among {len(weight)} experts of {experts.path}")
    parts: dict[str, GeneralizedComponent] = {
        "router": RouterBridge(name=router.path.removeprefix(f"{whole.path}.")),
        "experts": ExpertsBridge(name=experts.path.removeprefix(f"{whole.path}."), is_transposed=is_transposed),
    }
    shared = _shared(whole, inside, (router, experts))
    if shared is not None:
        findings.add(f"{where}.mlp.shared", f"{whole.path}.{shared.name} sees every token")
        parts["shared"] = shared
    return MoEBridge(name=name, submodules=parts)


def _shared(whole: Visit, inside: Sequence[Visit], others: Sequence[Visit]) -> MLPBridge | None:
    """Returns the template of the experts that see every token, or None where there are none."""
    for one in inside:
        parts = [call for call in inside if call.is_in(one.path) and call is not one]
        if not parts or any(other.is_in(one.path) or one.is_in(other.path) for other in others):
            continue
        outs = [call for call in parts if same(call.left, one.left) and linear_kind(call)]
        if outs and one.left is not None:
            maps = _maps(whole, one, parts, Contribution([one, *outs], one.left, source=[one, *outs]))
            return _template(whole, maps, parts)
    return None
