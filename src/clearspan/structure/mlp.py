"""The other sublayers' parts: plain and gated MLPs, and mixtures of experts."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clearspan.components import (
    ActivationBridge,
    ExpertsBridge,
    GatedMLPBridge,
    GeneralizedComponent,
    JointGateMLPBridge,
    MLPBridge,
    MoEBridge,
    OpaqueBridge,
    RouterBridge,
)
from clearspan.points import Layout
from clearspan.structure.algebra import factor, linear_kind, norm_kind, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.mixing import MixedError, mixes_between, mixes_positions
from clearspan.structure.templates import linear_template, norm_template
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
    if whole is not None and any(is_mixture(one) for one in inside):
        return _mixture(block, whole, inside, findings, where), whole
    maps = _maps(block, whole, inside, contribution)
    if whole is None:
        _check_positions(block, maps)
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
    norm = next((one for one in inside if same(one.left, outward.entered) and norm_kind(one)), None)
    return _Maps(whole or block, whole is not None, inward, outward, norm)


def _check_positions(block: Visit, maps: _Maps) -> None:
    """Raises where positions mix in what was taken for an MLP: it is none then, whatever its maps."""
    if maps.has_module:
        if mixes_positions(maps.whole, *block.size):
            raise MixedError(maps.whole)
    elif mixes_between(block, maps.inward, maps.outward, *block.size):
        names = ", ".join(one.path for one in maps.inward)
        raise MissingStructureError(f"positions mix between {names} and {maps.outward.path}")


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
    if maps.norm is not None:
        parts["norm"] = norm_template(maps.norm, maps.norm.path.removeprefix(f"{around}."), layout, 0)
    name = maps.whole.path.removeprefix(f"{block.path}.") if maps.has_module else None
    if name is None:
        act = next((one for one in inside if same(one.entered, maps.inward[0].left) and not linear_kind(one)), None)
        if act is not None and act.order < maps.outward.order:
            parts["act"] = ActivationBridge(name=act.path.removeprefix(f"{around}."), layout=layout)
    template = kind(name=name, submodules=parts, layout=_flat(maps.whole.entered) if name else Layout.TOKENS)
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
    if not _is_all(maps, only):
        raise MissingStructureError(f"{only.path} gives a part alone of what {maps.outward.path} is given")
    if only.left.shape[-1] == 2 * _kind_inputs(maps.outward):
        return JointGateMLPBridge, ["gate_up"]
    return MLPBridge, ["in"]


def _is_linear_in(maps: _Maps, one: Visit) -> bool:
    """Whether the output map's input doubles when a map's output does: the linear branch, and not the gate."""
    entered = maps.hidden.entered
    return entered is not None and same(_hidden_with(maps, one, lambda value: value * 2), entered * 2)


def _is_all(maps: _Maps, only: Visit) -> bool:
    """Whether the output map's input is the same for all tokens when a map's output is: nothing else makes it."""
    hidden = _hidden_with(maps, only, torch.zeros_like)
    return hidden is not None and same(hidden, hidden.flatten(0, -2)[:1].expand_as(hidden.flatten(0, -2)).clone())


def _hidden_with(maps: _Maps, one: Visit, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Returns the output map's input, or that of the norm before it, when a map's output is changed."""
    whole, hidden = maps.whole, maps.hidden
    args, kwargs = fresh_arguments(whole)
    inner = one.path.removeprefix(f"{whole.path}.")
    changed = traced(whole.module, lambda: whole.module(*args, **kwargs), {inner: change})
    return next(visit for visit in changed.visits if visit.path == hidden.path.removeprefix(f"{whole.path}.")).entered


def is_mixture(visit: Visit) -> bool:
    """Whether a module holds the weights of several experts in one tensor."""
    return any(one is not None and one.ndim == 3 for one in visit.module._parameters.values())


def _mixture(
    block: Visit, whole: Visit, inside: Sequence[Visit], findings: Findings, where: str
) -> GeneralizedComponent:
    """Returns the template of a mixture of experts; of one whose parts are not told apart, the ends alone."""
    experts = next(one for one in inside if is_mixture(one))
    name = whole.path.removeprefix(f"{block.path}.")
    router = router_template(whole, inside, experts)
    holds = experts_template(whole, experts)
    if router is None or holds is None:
        findings.add(f"{where}.mlp", f"a mixture, of which only the ends are known: {whole.path}")
        return OpaqueBridge(name, output_is_overwritten=whole.is_overwritten)
    parts: dict[str, GeneralizedComponent] = {"router": router, "experts": holds}
    findings.add(f"{where}.mlp", f"a mixture: {whole.path}.{router.name} chooses among the experts of {experts.path}")
    shared = _shared(whole, inside, [experts, *(one for one in inside if one.is_in(f"{whole.path}.{router.name}"))])
    gate = None
    if shared is not None:
        findings.add(f"{where}.mlp.shared", f"{whole.path}.{shared.name} sees every token")
        parts["shared"] = shared
        gate = next(
            (one for one in inside if linear_kind(one) and one.left is not None and one.left.shape[-1] == 1), None
        )
        if gate is not None:
            parts["shared_gate"] = linear_template(gate, gate.path.removeprefix(f"{whole.path}."), _flat(gate.left))
    multiplier = _multiplier(whole, experts, None if shared is None else shared.name, inside, gate)
    if multiplier is None:
        findings.add(f"{where}.mlp", f"what {whole.path} adds is not what its experts give")
        return OpaqueBridge(name, output_is_overwritten=whole.is_overwritten)
    return MoEBridge(
        name=name,
        submodules=parts,
        multiplier=multiplier,
        runs_all=not holds.has_ends,
        layout=_flat(whole.left),
        output_is_overwritten=whole.is_overwritten,
    )


def _multiplier(
    whole: Visit, experts: Visit, name: str | None, inside: Sequence[Visit], gate: Visit | None
) -> float | None:
    """Returns what a mixture multiplies its experts' output by, before it adds the shared one's; None if it is no such.

    Experts that all run are summed otherwise, and their output is not looked at.
    """
    if whole.left is None or experts.left is None or experts.left.numel() != whole.left.numel():
        return 1.0
    if name is None:
        return factor(experts.left, whole.left)
    shared = next(one for one in inside if one.path == f"{whole.path}.{name}")
    if shared.left is None:
        return 1.0
    number = 1.0 if gate is None or gate.left is None else gate.left.sigmoid().reshape(-1, 1)
    flat = [one.reshape(-1, one.shape[-1]) for one in (experts.left, shared.left, whole.left)]
    return factor(flat[0], flat[2] - number * flat[1])


def _flat(value: Tensor | None) -> Layout:
    """Returns how rows and positions lie in a tensor."""
    return Layout.FLAT if value is not None and value.ndim == 2 else Layout.TOKENS


def experts_template(whole: Visit, experts: Visit) -> ExpertsBridge | None:
    """Returns the template of all experts, or None where their weights are of no known layout."""
    inward, outward = (experts.module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if inward is None or outward is None or whole.entered is None or inward.ndim != 3:
        return None
    width = whole.entered.shape[-1]
    is_transposed = inward.shape[-2] == width and outward.shape[-1] == width and inward.shape[-1] != width
    tokens = whole.entered.numel() // width
    has_ends = experts.left is not None and experts.left.numel() == tokens * width
    layout = _flat(experts.entered)
    name = experts.path.removeprefix(f"{whole.path}.")
    return ExpertsBridge(name, is_transposed=is_transposed, has_ends=has_ends, layout=layout)


def router_template(whole: Visit, inside: Sequence[Visit], experts: Visit) -> RouterBridge | None:
    """Returns the template of what chooses experts: a module with a map to a logit for each of them."""
    first = next(one for one in experts.module._parameters.values() if one is not None and one.ndim == 3)
    count = len(first)
    for one in inside:
        if one is experts or not one.path.startswith(f"{whole.path}."):
            continue
        maps = [call for call in inside if call.is_in(one.path) and linear_kind(call) and _gives(call, count)]
        own = one.module._parameters.get("weight")
        is_map = own is not None and own.ndim == 2 and len(own) == count and not one.module._modules
        if not (maps or is_map):
            continue
        name = one.path.removeprefix(f"{whole.path}.")
        logits = maps[0].path.removeprefix(f"{one.path}.") if maps and maps[0] is not one else ""
        chosen = _chosen(one, experts)
        if chosen is None:
            return None
        weights, indices, k = chosen
        has_k = isinstance(vars(one.module).get("top_k"), int)
        return RouterBridge(name, logits=logits, weights=weights, indices=indices, k=None if has_k else k)
    return None


def _gives(call: Visit, count: int) -> bool:
    return call.left is not None and call.left.shape[-1] == count


def _chosen(router: Visit, experts: Visit) -> tuple[int | str, int | str, int] | None:
    """Returns where weights and indices of the chosen experts are, and how many are chosen for each token."""
    parameters = list(inspect.signature(type(experts.module).forward).parameters)[1:]
    named = {**dict(zip(parameters, experts.args, strict=False)), **experts.kwargs}
    pairs = [(name, one) for name, one in named.items() if isinstance(one, Tensor) and one.ndim == 2]
    indices = next(((name, one) for name, one in pairs if not one.is_floating_point()), None)
    if indices is None:
        return (1, 2, 0) if router.n_returned > 2 else (0, 1, 0)
    weights = next(
        ((name, one) for name, one in pairs if one.shape == indices[1].shape and one is not indices[1]), None
    )
    if weights is None:
        return None
    return _output_of(router, weights), _output_of(router, indices), indices[1].shape[-1]


def _output_of(router: Visit, argument: tuple[str, Tensor]) -> int | str:
    """Returns which of the router's outputs an argument of the experts is, or the argument's name."""
    name, value = argument
    for index, one in enumerate(router.outputs):
        if isinstance(one, Tensor) and one.shape == value.shape and torch.equal(one, value):
            return index
    return name


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


def dense_mlp(around: Visit, one: Visit, inside: Sequence[Visit]) -> MLPBridge:
    """Returns the template of a dense MLP with a module of its own.

    Args:
        around: The call of the module that the template's name is relative to.
        one: The MLP's call.
        inside: Calls in it.
    """
    assert one.left is not None, "it gives a tensor"
    outs = [call for call in inside if same(call.left, one.left) and linear_kind(call)]
    maps = _maps(around, one, inside, Contribution([one, *outs], one.left, source=[one, *outs]))
    return _template(around, maps, inside)
