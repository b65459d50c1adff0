"""The parts of mixtures of experts: a router, experts, those that see every token, and what lies around them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clearspan.components import (
    GeneralizedComponent,
    MLPBridge,
    MoEBridge,
    OpaqueBridge,
    RouterBridge,
)
from clearspan.structure.algebra import coefficients, linear_kind, norm_kind, same
from clearspan.structure.experts import choice_of, experts_template, has_identities
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.mlp import find_maps, layout_of, mlp_template
from clearspan.structure.templates import linear_template, norm_template
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import Contribution


def find_mixture(
    trace: Trace, block: Visit, whole: Visit, experts: Visit, findings: Findings, where: str
) -> GeneralizedComponent:
    """Returns the template of a mixture of experts; of one whose parts are not told apart, the ends alone.

    Args:
        trace: The traced forward.
        block: The block's call.
        whole: The call of the mixture.
        experts: The call of its experts.
        findings: Where to say what was found.
        where: The block's canonical path.
    """
    name = whole.path.removeprefix(f"{block.path}.")
    try:
        return _mixture(name, whole, trace.inside(whole), experts, findings, where)
    except MissingStructureError as error:
        findings.add(f"{where}.mlp", f"a mixture, of which only the ends are known: {whole.path}: {error}")
        return OpaqueBridge(name, output_is_overwritten=whole.is_overwritten)


def _mixture(
    name: str, whole: Visit, inside: Sequence[Visit], experts: Visit, findings: Findings, where: str
) -> MoEBridge:
    """Returns the template of a mixture.

    Raises:
        MissingStructureError: Some of its parts is not found.
    """
    assert whole.entered is not None, "a mixture reads a tensor"
    holds = experts_template(whole, experts, whole.entered.shape[-1])
    if holds is None:
        raise MissingStructureError(f"which weights of {experts.path} read, and which add")
    chooser, router = find_router(whole, inside, experts)
    identities = has_identities(experts, _count(chooser, router))
    if identities is None:
        raise MissingStructureError(f"what experts without weights of {experts.path} give")
    parts: dict[str, GeneralizedComponent] = {"router": router, "experts": holds}
    findings.add(f"{where}.mlp", f"a mixture: {chooser.path} chooses among the experts of {experts.path}")
    calls, maps = _around(whole, inside, experts)
    shared = _shared(whole, inside, [experts, chooser, *calls.values()])
    if shared is not None:
        parts["shared"] = shared
        findings.add(f"{where}.mlp.shared", f"{whole.path}.{shared.name} sees every token")
        parts |= _shared_gate(whole, inside, [experts, chooser, *calls.values()], shared)
    norm, numbers = _sum(whole, inside, calls.get("project_out", experts), parts)
    if norm is not None:
        maps["norm"] = norm_template(norm, norm.path.removeprefix(f"{whole.path}."), layout_of(norm.left))
    return MoEBridge(
        name=name,
        submodules={**parts, **maps},
        multiplier=numbers[0],
        shared_multiplier=numbers[1],
        has_identities=identities,
        runs_all=choice_of(experts) is None and not holds.has_ends,
        layout=layout_of(whole.left),
        output_is_overwritten=whole.is_overwritten,
    )


# --- what is added ---------------------------------------------------------------------------------------------------


def _around(
    whole: Visit, inside: Sequence[Visit], experts: Visit
) -> tuple[dict[str, Visit], dict[str, GeneralizedComponent]]:
    """Returns the linear maps to what experts read and from what they give, where that has a width of its own."""
    assert whole.entered is not None, "a mixture reads a tensor"
    if experts.entered is None or experts.entered.shape[-1] == whole.entered.shape[-1]:
        return {}, {}
    ends = {
        "project_in": next((one for one in inside if linear_kind(one) and same(one.left, experts.entered)), None),
        "project_out": next((one for one in inside if linear_kind(one) and same(one.entered, experts.left)), None),
    }
    calls = {key: one for key, one in ends.items() if one is not None}
    if len(calls) < len(ends):
        raise MissingStructureError(f"{experts.path} reads what no linear map gives, or gives what none reads")
    return calls, {
        key: linear_template(one, one.path.removeprefix(f"{whole.path}."), layout_of(one.left))
        for key, one in calls.items()
    }


def _sum(
    whole: Visit, inside: Sequence[Visit], last: Visit, parts: Mapping[str, GeneralizedComponent]
) -> tuple[Visit | None, tuple[float, float]]:
    """Returns the norm of what a mixture sums up, if there is one, and what experts and shared ones are multiplied by.

    Experts that all run are summed otherwise, and their output is not looked at.

    Raises:
        MissingStructureError: What it adds is no such sum.
    """
    if whole.left is None or last.left is None or last.left.numel() != whole.left.numel():
        return None, (1.0, 1.0)
    terms = [last.left.reshape(whole.left.shape)]
    shared = parts.get("shared")
    if shared is not None:
        seen = next(one for one in inside if one.path == f"{whole.path}.{shared.name}")
        gate = parts.get("shared_gate")
        gates = [] if gate is None else [one for one in inside if one.path == f"{whole.path}.{gate.name}"]
        number = torch.ones(()) if not gates or gates[0].left is None else gates[0].left.sigmoid()
        number = number.reshape(*whole.left.shape[:-1], 1) if number.ndim else number
        assert seen.left is not None, "found by its output"
        terms.append(seen.left.reshape(whole.left.shape) * number)
    norms = [one for one in inside if norm_kind(one) and same(one.left, whole.left)]
    for norm, total in ((None, whole.left), *((one, one.entered) for one in norms)):
        found = None if total is None else coefficients(terms, total)
        if found is not None:
            return norm, (found[0], found[1] if len(found) > 1 else 1.0)
    raise MissingStructureError(f"what {whole.path} adds is not what its experts give")


# --- the router ------------------------------------------------------------------------------------------------------


def find_router(whole: Visit, inside: Sequence[Visit], experts: Visit) -> tuple[Visit, RouterBridge]:
    """Returns what chooses experts, a module with a map to a logit for each of them: its call and its template.

    Args:
        whole: The call of the module that the template's name is relative to.
        inside: Calls in it.
        experts: The call of the experts.

    Raises:
        MissingStructureError: There is none.
    """
    outside = [one for one in inside if not one.is_in(experts.path) and not experts.is_in(one.path)]
    # The outermost module that does it: an inner one may give the logits alone.
    for one in sorted(outside, key=lambda call: (not _returns_choice(call, experts), call.depth, call.order)):
        found = _logits(one, outside, experts)
        if found is None:
            continue
        choice = choice_of(experts)
        places = {"weights": 1, "indices": 2, "k": None}
        if choice is None:
            places |= {} if one.n_returned > 2 else {"weights": 0, "indices": 1}
            places["k"] = 0
        else:
            places = {"weights": _output_of(one, choice.weights), "indices": _output_of(one, choice.indices)}
            places["k"] = choice.k
        has_k = isinstance(vars(one.module).get("top_k"), int)
        name = one.path.removeprefix(f"{whole.path}.")
        return one, RouterBridge(name, **found, **{**places, "k": None if has_k else places["k"]})
    raise MissingStructureError(f"no module of {whole.path} gives a logit for each expert")


def _returns_choice(call: Visit, experts: Visit) -> bool:
    """Whether a module returns the experts that are chosen."""
    choice = choice_of(experts)
    return choice is not None and isinstance(_output_of(call, choice.indices), int)


def _logits(one: Visit, outside: Sequence[Visit], experts: Visit) -> dict[str, str] | None:
    """Returns where a router has the map to its logits; None where a module is no router."""
    for call in (call for call in outside if call.is_in(one.path) and linear_kind(call)):
        if _chooses(call.left, one, experts):
            return {"logits": call.path.removeprefix(one.path).lstrip(".")}
    if experts.entered is None or not (_returns_choice(one, experts) or not one.module._modules):
        return None
    own = {
        path.rpartition(".")[0]
        for path, weight in one.module.named_parameters()
        if path.rpartition(".")[2] == "weight" and weight.ndim == 2 and _fits(len(weight), experts)
    }
    return {"holder": own.pop()} if len(own) == 1 else None


def _fits(count: int, experts: Visit) -> bool:
    """Whether a number may be that of the experts to choose from."""
    choice = choice_of(experts)
    if choice is not None:
        return count > int(choice.indices[1].max())
    first = next(one for one in experts.module._parameters.values() if one is not None and one.ndim == 3)
    return count == len(first)


def _chooses(logits: Tensor | None, router: Visit, experts: Visit) -> bool:
    """Whether a map's output is a logit for each expert: they are as many, or the largest ones are chosen."""
    choice = choice_of(experts)
    if logits is None or logits.shape[-1] < (0 if choice is None else choice.k) or not _fits(logits.shape[-1], experts):
        return False
    if choice is None or _returns_choice(router, experts):
        return True
    largest = logits.reshape(-1, logits.shape[-1]).topk(choice.k, -1).indices
    return torch.equal(largest.sort(-1).values, choice.indices[1].sort(-1).values.to(largest))


def _count(chooser: Visit, router: RouterBridge) -> int:
    """Returns how many experts a router chooses from."""
    module = chooser.module.get_submodule(router.logits or router.holder)
    return len(module.get_parameter("weight"))


def _output_of(router: Visit, argument: tuple[str, Tensor]) -> int | str:
    """Returns which of the router's outputs an argument of the experts is, or the argument's name."""
    name, value = argument
    for index, one in enumerate(router.outputs):
        if isinstance(one, Tensor) and one.shape == value.shape and torch.equal(one, value):
            return index
    return name


# --- experts that see every token ------------------------------------------------------------------------------------


def _shared(whole: Visit, inside: Sequence[Visit], others: Sequence[Visit]) -> MLPBridge | None:
    """Returns the template of the experts that see every token, or None where there are none."""
    for one in inside:
        parts = [call for call in inside if call.is_in(one.path) and call is not one]
        if not parts or any(other.is_in(one.path) or one.is_in(other.path) for other in others):
            continue
        outs = [call for call in parts if same(call.left, one.left) and linear_kind(call)]
        if outs and one.left is not None:
            maps = find_maps(whole, one, parts, Contribution([one, *outs], one.left, source=[one, *outs]))
            return mlp_template(whole, maps, parts)
    return None


def _shared_gate(
    whole: Visit, inside: Sequence[Visit], others: Sequence[Visit], shared: MLPBridge
) -> dict[str, GeneralizedComponent]:
    """Returns the map to a number for each token that multiplies what the shared experts give, where there is one."""
    for one in inside:
        is_other = any(one.is_in(other.path) for other in others) or one.is_in(f"{whole.path}.{shared.name}")
        if not is_other and linear_kind(one) and one.left is not None and one.left.shape[-1] == 1:
            path = one.path.removeprefix(f"{whole.path}.")
            return {"shared_gate": linear_template(one, path, layout_of(one.left))}
    return {}
