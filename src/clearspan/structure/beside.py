"""A dense MLP beside a mixture of experts, whose sum is normed before it is added to the stream."""

from collections.abc import Sequence

from clearspan.components import GeneralizedComponent, MLPBesideMixtureBridge
from clearspan.points import Layout
from clearspan.structure.algebra import norm_kind, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.mlp import dense_mlp, experts_template, is_mixture, router_template
from clearspan.structure.templates import norm_template
from clearspan.structure.trace import Visit
from clearspan.structure.wiring import Contribution


def find_beside(
    block: Visit, contribution: Contribution, inside: Sequence[Visit], findings: Findings, where: str
) -> tuple[MLPBesideMixtureBridge, Visit]:
    """Returns the template of a dense MLP and a mixture beside it, and the call of the dense one.

    Args:
        block: The block's call.
        contribution: What they add, with the two summands.
        inside: Calls in the block.
        findings: Where to say what was found.
        where: The block's canonical path.

    Raises:
        MissingStructureError: The summands are others.
    """
    parts: dict[str, GeneralizedComponent] = {}
    found: dict[str, Visit] = {}
    for summand in contribution.summands:
        given = _behind(summand, inside)
        key = "experts" if is_mixture(given) else "shared"
        found[key] = given
        if given is not summand:
            parts[f"{key}_norm_post"] = _norm(summand, block)
    if len(found) < 2:
        raise MissingStructureError(f"what {block.path} adds is the sum of two parts, and not of an MLP and a mixture")
    experts, dense = found["experts"], found["shared"]
    others = [one for one in inside if not one.is_in(dense.path)]
    router, holds = router_template(block, others, experts), experts_template(block, experts)
    norm = next((one for one in others if norm_kind(one) and same(one.left, experts.entered)), None)
    if router is None or holds is None or norm is None:
        raise MissingStructureError(f"how {experts.path} is given tokens and their experts")
    chooses = next(one for one in others if one.path == f"{block.path}.{router.name}")
    scored = next((one for one in others if one.path == f"{chooses.path}.{router.logits}"), chooses)
    router.changes_input = not same(scored.entered, chooses.entered)
    parts |= {
        "router": router,
        "experts": holds,
        "shared": dense_mlp(block, dense, [one for one in inside if one.is_in(dense.path)]),
        "experts_norm": _norm(norm, block),
    }
    findings.add(f"{where}.mlp", f"{dense.path}, and beside it the mixture of {experts.path}; their sum is normed")
    return MLPBesideMixtureBridge(submodules=parts), dense


def _behind(summand: Visit, inside: Sequence[Visit]) -> Visit:
    """Returns the outermost call whose output a summand norms, or the summand itself where it is no norm."""
    if not norm_kind(summand):
        return summand
    given = [one for one in inside if one.order < summand.order and same(one.left, summand.entered)]
    return min(given, key=lambda one: one.depth) if given else summand


def _norm(visit: Visit, block: Visit) -> GeneralizedComponent:
    layout = Layout.FLAT if visit.left is not None and visit.left.ndim == 2 else Layout.TOKENS
    return norm_template(visit, visit.path.removeprefix(f"{block.path}."), layout)
