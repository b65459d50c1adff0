"""A dense MLP beside a mixture of experts, whose sum is normed before it is added to the stream."""

from collections.abc import Sequence

from clearspan.components import GeneralizedComponent, MLPBesideMixtureBridge
from clearspan.structure.algebra import norm_kind, same
from clearspan.structure.experts import choice_of, experts_template
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.mixture import find_router
from clearspan.structure.mlp import find_maps, layout_of, mlp_template
from clearspan.structure.templates import norm_template
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import Contribution


def find_beside(
    trace: Trace, block: Visit, contribution: Contribution, findings: Findings, where: str
) -> tuple[MLPBesideMixtureBridge, Visit]:
    """Returns the template of a dense MLP and a mixture beside it, and the call of the dense one.

    Args:
        trace: The traced forward.
        block: The block's call.
        contribution: What they add, with the two summands.
        findings: Where to say what was found.
        where: The block's canonical path.

    Raises:
        MissingStructureError: The summands are others.
    """
    inside, parts = trace.inside(block), dict[str, GeneralizedComponent]()
    found: dict[str, Visit] = {}
    for summand in contribution.summands:
        given = _behind(summand, inside)
        key = "shared" if choice_of(given) is None else "experts"
        found[key] = given
        if given is not summand:
            parts[f"{key}_norm_post"] = _norm(summand, block)
    if len(found) < 2:
        raise MissingStructureError(f"what {block.path} adds is the sum of two parts, and not of an MLP and a mixture")
    experts, dense = found["experts"], found["shared"]
    others = [one for one in inside if not one.is_in(dense.path)]
    assert block.entered is not None, "a block reads the stream"
    d_model = block.entered.shape[-1]
    holds = experts_template(block, experts, d_model)
    norm = next((one for one in others if norm_kind(one) and same(one.left, experts.entered)), None)
    if holds is None or norm is None:
        raise MissingStructureError(f"how {experts.path} is given tokens, and which of its weights read")
    chooses, router = find_router(block, others, experts)
    scored = next((one for one in others if one.path == f"{chooses.path}.{router.logits}"), chooses)
    router.changes_input = not same(scored.entered, chooses.entered)
    parts |= {
        "router": router,
        "experts": holds,
        "shared": _dense(block, dense, trace.inside(dense)),
        "experts_norm": _norm(norm, block),
    }
    findings.add(f"{where}.mlp", f"{dense.path}, and beside it the mixture of {experts.path}; their sum is normed")
    return MLPBesideMixtureBridge(submodules=parts), dense


def _dense(block: Visit, one: Visit, inside: Sequence[Visit]) -> GeneralizedComponent:
    """Returns the template of the dense MLP."""
    assert one.left is not None, "a norm reads its output"
    outs = [call for call in inside if same(call.left, one.left)]
    maps = find_maps(block, one, inside, Contribution([one, *outs], one.left, source=[one, *outs]))
    return mlp_template(block, maps, inside)


def _behind(summand: Visit, inside: Sequence[Visit]) -> Visit:
    """Returns the outermost call whose output a summand norms, or the summand itself where it is no norm."""
    if not norm_kind(summand):
        return summand
    given = [one for one in inside if one.order < summand.order and same(one.left, summand.entered)]
    return min(given, key=lambda one: one.depth) if given else summand


def _norm(visit: Visit, block: Visit) -> GeneralizedComponent:
    return norm_template(visit, visit.path.removeprefix(f"{block.path}."), layout_of(visit.left))
