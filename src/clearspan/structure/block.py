"""A block's template, put together from its wiring and its sublayers."""

from collections.abc import Sequence

from torch import Tensor

from clearspan.components import BlockBridge, GeneralizedComponent
from clearspan.points import Layout
from clearspan.structure.algebra import as_tokens, same
from clearspan.structure.attention import Attention, attention_template, find_attention
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.frame import norm_template
from clearspan.structure.mlp import mlp_template, reads_stream
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import Contribution, Wiring, find_wiring


def block_template(trace: Trace, block: Visit, path: str, findings: Findings, where: str) -> BlockBridge:
    """Returns the template of one block.

    Args:
        trace: The traced forward.
        block: The block's call.
        path: Path of the list of blocks.
        findings: Where to say what was found.
        where: The block's canonical path.

    Raises:
        MissingStructureError: A sublayer or the wiring was not found.
    """
    wiring = find_wiring(trace, block)
    attended = [one for one in trace.attended if one.path == block.path or one.path.startswith(f"{block.path}.")]
    if len(attended) != 1 or len(wiring.contributions) != 2:
        raise MissingStructureError(
            f"{block.path} attends {len(attended)} times and adds {len(wiring.contributions)} contributions"
        )
    attention = find_attention(trace, block, attended[0])
    first, second = wiring.contributions
    if not _gives(attention, first):
        first, second = second, first
    if not _gives(attention, first):
        raise MissingStructureError(f"{attention.output.path} gives none of what {block.path} adds")
    return _put_together(trace, block, path, wiring, attention, (first, second), findings, where)


def _gives(attention: Attention, contribution: Contribution) -> bool:
    return any(one is attention.output or same(one.left, attention.output.left) for one in contribution.source)


def _put_together(
    trace: Trace,
    block: Visit,
    path: str,
    wiring: Wiring,
    attention: Attention,
    both: tuple[Contribution, Contribution],
    findings: Findings,
    where: str,
) -> BlockBridge:
    first, second = both
    attn = attention_template(attention, block, findings, where)
    whole = [one for one in trace.at(attention.path) if one.order > block.order]
    attn.output_is_overwritten = bool(whole) and whole[0].is_overwritten
    inside = trace.inside(block)
    used = [one for one in inside if one.is_in(attention.path)]
    mlp = mlp_template(trace, block, second, used, findings, where)
    norms = _norms(trace, block, wiring, attention, both)
    parts: dict[str, GeneralizedComponent] = {}
    for key, part in (("ln1", None), ("attn", attn), ("ln1_post", None), ("ln2", None), ("mlp", mlp), ("ln2_post", None)):
        if part is not None:
            parts[key] = part
        elif key in norms:
            parts[key] = _norm(norms[key], block, wiring)
    numbers = {one.factor for one in both}
    if len(numbers) > 1:
        raise MissingStructureError(f"{block.path} multiplies what its sublayers add by different numbers")
    return BlockBridge(
        name=path,
        submodules=parts,
        is_parallel=len({one.stage for one in both}) == 1,
        attn_out=_adds(first, block, attn),
        mlp_out=_adds(second, block, mlp),
        residual_multiplier=first.factor,
        norms_the_sum=bool(wiring.norms_the_sum),
        residual_is_normed=bool(wiring.residual_norms),
    )


def _norms(
    trace: Trace, block: Visit, wiring: Wiring, attention: Attention, both: tuple[Contribution, Contribution]
) -> dict[str, Visit]:
    """Returns the calls of a block's norms by canonical name."""
    found: dict[str, Visit] = {}
    if wiring.norms_the_sum:
        return dict(zip(("ln1", "ln2"), wiring.norms_the_sum, strict=False))
    if wiring.residual_norms:
        return dict(zip(("ln1", "ln2"), wiring.residual_norms, strict=False))
    inside = [one for one in trace.inside(block) if not one.is_in(attention.path)]
    parallel = both[0].stage == both[1].stage
    before = reads_stream(inside, wiring.streams[both[0].stage])
    read_by_attention = [one for one in before if _feeds(one, attention)]
    if read_by_attention:
        found["ln1"] = read_by_attention[0]
    between = reads_stream(inside, wiring.streams[both[1].stage])
    between = [one for one in between if one is not found.get("ln1") and (not parallel or one in before)]
    if between:
        found["ln2"] = between[-1]
    for key, one in (("ln1_post", both[0]), ("ln2_post", both[1])):
        if one.post_norm is not None:
            found[key] = one.post_norm
    return found


def _feeds(norm: Visit, attention: Attention) -> bool:
    maps = (attention.query.map, attention.key.map, attention.value.map)
    return any(same(one.entered, norm.left) for one in maps) or any(
        same(one.entered, norm.left) for one in attention.query.others
    ) or _is_read_by(norm, attention)


def _is_read_by(norm: Visit, attention: Attention) -> bool:
    return norm.order < attention.attended.order


def _norm(visit: Visit, block: Visit, wiring: Wiring) -> GeneralizedComponent:
    assert visit.left is not None, "a norm has an output"
    layout = Layout.FLAT if visit.left.ndim == 2 else Layout.TOKENS
    template = norm_template(visit, visit.path.removeprefix(f"{block.path}."), layout)
    template.output_is_overwritten = visit in wiring.norms_the_sum[:-1]  # it is the stream: a write goes into it
    return template


def _adds(contribution: Contribution, block: Visit, part: GeneralizedComponent) -> str | None:
    """Returns the path of the module whose output a sublayer adds, where that is not the sublayer's own."""
    if contribution.post_norm is not None:
        return None
    names = [one.path.removeprefix(f"{block.path}.") for one in contribution.calls]
    if part.name in names:
        after = [one for one in contribution.calls if not one.is_in(f"{block.path}.{part.name}")]
        later = [one for one in after if one.order > contribution.calls[0].order]
        return later[-1].path.removeprefix(f"{block.path}.") if later else None
    outermost = max(contribution.calls, key=lambda one: (-one.depth, one.order))
    return outermost.path.removeprefix(f"{block.path}.")


def tokens(value: Tensor, like: Tensor) -> Tensor | None:
    """Returns a tensor with rows and positions as another has them."""
    return as_tokens(value, like.shape[0], like.shape[1])


Blocks = Sequence[Visit]
