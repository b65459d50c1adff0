"""How tokens become the residual stream: embeddings, and the norm or the linear map that they pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from clearspan.components import EmbeddingBridge, GeneralizedComponent, PosEmbedBridge, TypeEmbedBridge
from clearspan.points import Layout
from clearspan.structure.algebra import coefficients, factor, linear_kind, norm_kind, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.frame import Blocks
from clearspan.structure.templates import call_number, norm_template, opaque
from clearspan.structure.trace import Trace, Visit

LEAST = 1e-6
"""What tokens are multiplied by at least: with less they are not in a sum."""


@dataclass(frozen=True)
class Inward:
    """How tokens become the residual stream.

    Attributes:
        parts: Components by canonical name, in the order of the forward.
        table: The call of the position embedding, or None.
        is_all: Whether the residual stream is their sum.
    """

    parts: dict[str, GeneralizedComponent]
    table: Visit | None = None
    is_all: bool = True


@dataclass(frozen=True)
class _Sum:
    """What adds up to a tensor.

    Attributes:
        token: The call whose output tokens add: the embedding's, or that of a norm or linear map of it.
        multiplier: What it is multiplied by.
        tables: The calls that add the same for all rows.
        through: Norms and linear maps that the sum passes on its way to the blocks.
        is_inline: Whether the model's own forward, and no module, adds the same for all rows.
    """

    token: Visit
    multiplier: float
    tables: Sequence[Visit] = ()
    through: Sequence[Visit] = field(default_factory=tuple)
    is_inline: bool = False


def find_inward(trace: Trace, blocks: Blocks, ids: Tensor, findings: Findings) -> Inward:
    """Returns the embeddings, and what lies between them and the first block.

    Raises:
        MissingStructureError: The stream is no sum of embeddings, as it is or through norms and linear maps; where
            blocks are woven, it need not be one.
    """
    before = [visit for visit in trace.visits[: blocks.visits[0].order] if visit.left is not None]
    before += [] if blocks.entry is None else [blocks.entry]
    embed = next((one for one in before if _is_lookup(one) and _equals(one.entered, ids)), None)
    if embed is None:
        raise MissingStructureError("no module looks the token ids up")
    try:
        found = _found(before, embed, blocks.first)
        end = next((one for one in reversed(before) if same(one.left, blocks.first)), None)
        if found.is_inline and end is None:
            raise MissingStructureError("no module gives the sum of tokens and of what the model adds for positions")
    except MissingStructureError:
        if not blocks.is_woven:
            raise
        findings.add("hook_embed", f"{embed.path} looks the token ids up")
        own = EmbeddingBridge(name=embed.path, output_is_overwritten=embed.is_overwritten)
        return Inward({"embed": own}, is_all=False)
    names = " + ".join(one.path for one in (found.token, *found.tables))
    passed = "".join(f", through {one.path}" for one in reversed(found.through))
    findings.add("hook_embed", f"{names}{passed} is the stream that enters the blocks", found.multiplier)
    return _parts(trace, embed, found, ids, blocks.first.shape[-1], end)


def _found(before: Sequence[Visit], embed: Visit, stream: Tensor) -> _Sum:
    """Returns what adds up to the stream, or to what norms and linear maps make it of."""
    chain = _back(before, stream)
    for adds_up in (_adds_up, _adds_up_inline):
        for index, total in enumerate((stream, *(one.entered for one in chain))):
            found = None if total is None else adds_up(before, embed, total)
            if found is not None:
                return replace(found, through=chain[:index])
    raise MissingStructureError("the residual stream is no sum of embeddings' outputs")


def _back(before: Sequence[Visit], stream: Tensor) -> list[Visit]:
    """Returns the norms and linear maps, one after the other, whose output is the stream, the last first."""
    chain: list[Visit] = []
    total: Tensor | None = stream
    while total is not None:
        passed = next(
            (one for one in reversed(before) if same(one.left, total) and (norm_kind(one) or linear_kind(one))), None
        )
        if passed is None or passed in chain:
            break
        chain.append(passed)
        total = passed.entered
    return chain


def _adds_up(before: Sequence[Visit], embed: Visit, total: Tensor) -> _Sum | None:
    others = [one for one in before if one is not embed and _is_token_free(one, total)]
    tables = [one for one in others if _is_lookup(one)] or others
    for token in _ways(before, embed):
        if token.left is None or token.left.shape != total.shape:
            continue
        for chosen in _subsets(tables):
            found = coefficients([token.left, *(_spread(one, total) for one in chosen)], total)
            if found is not None and abs(found[0]) > LEAST and all(abs(one - 1) < 1e-4 for one in found[1:]):
                return _Sum(token, found[0], chosen)
    return None


def _adds_up_inline(before: Sequence[Visit], embed: Visit, total: Tensor) -> _Sum | None:
    """Returns a sum of tokens and of something that is the same for all rows, and no module's output."""
    for token in _ways(before, embed):
        if token.left is None or token.left.shape != total.shape:
            continue
        found = factor(token.left[1:] - token.left[:1], total[1:] - total[:1])
        if found is not None and abs(found) > LEAST:
            return _Sum(token, found, is_inline=True)
    return None


def _ways(before: Sequence[Visit], embed: Visit) -> list[Visit]:
    """Returns the embedding's call, and those of norms and linear maps that its output passes, one after the other.

    A map may read more beside it, in further channels.
    """
    ways = [embed]
    for one in before:
        if _begins_with(one.entered, ways[-1].left) and (norm_kind(one) or linear_kind(one)):
            ways.append(one)
    return ways


def _begins_with(whole: Tensor | None, part: Tensor | None) -> bool:
    """Whether the first channels of a tensor are another one's."""
    if whole is None or part is None or whole.shape[:-1] != part.shape[:-1]:
        return False
    return same(whole[..., : part.shape[-1]], part)


def _within(trace: Trace, embed: Visit) -> dict[str, GeneralizedComponent]:
    """Returns the norm in the embedding's own module whose output is its own, if there is one."""
    norm = next((one for one in trace.inside(embed) if norm_kind(one) and same(one.left, embed.left)), None)
    return {} if norm is None else {"norm": norm_template(norm, norm.path.removeprefix(f"{embed.path}."))}


def _parts(trace: Trace, embed: Visit, found: _Sum, ids: Tensor, d_model: int, end: Visit | None) -> Inward:
    """Returns the components of what was found; `end` is the call that gives the stream."""
    own = EmbeddingBridge(
        name=embed.path,
        submodules=_within(trace, embed),
        multiplier=found.multiplier,
        output_is_overwritten=embed.is_overwritten,
    )
    passed = [*([found.token] if found.token is not embed else []), *reversed(found.through)]
    own.ends_at = passed[-1].path if passed else None
    own.ends_at_call = call_number(trace, passed[-1]) if passed else None
    if found.is_inline and not passed and end is not None:
        own.ends_at = end.path
    if (found.through or found.is_inline) and found.multiplier != 1:
        own.multiplier = 1.0  # the norm or map at which it ends has it
    parts: dict[str, GeneralizedComponent] = {"embed": own}
    table = None
    if found.is_inline:
        parts["pos_embed"] = PosEmbedBridge(table=None, ends_in_embed=True)
    for one in found.tables:
        if _is_one_vector(one):
            parts["type_embed"] = TypeEmbedBridge(name=one.path, ends_in_embed=bool(found.through))
        else:
            table = one
            parts["pos_embed"] = _pos_embed(one, ids, ends_in_embed=bool(found.through))
    for one in passed:
        part = opaque(one, one.path, d_model)
        part.call = call_number(trace, one)
        part.output_is_overwritten = one.is_overwritten
        parts["embed_norm" if norm_kind(one) else "project_in"] = part
    return Inward(parts, table)


def _pos_embed(table: Visit, ids: Tensor, *, ends_in_embed: bool) -> PosEmbedBridge:
    assert table.left is not None, "calls without an output are left out"
    entered = table.entered if not table.args or isinstance(table.args[0], Tensor) else None
    row = None
    if entered is not None and not entered.is_floating_point() and entered.shape[-1] == ids.shape[1]:
        first = entered.reshape(-1, ids.shape[1])[0]
        row = first if bool((first.diff() == 1).all()) else None
    name, offset = _row_of(table, table.left.reshape(-1, table.left.shape[-1])[0])
    return PosEmbedBridge(
        name=table.path,
        offset=offset,
        input_is_positions=row is not None and (name is None or int(row[0]) == offset),
        table=name,
        ends_in_embed=ends_in_embed,
        layout=Layout.ONE_ROW if table.left.ndim == 2 else Layout.TOKENS,
    )


def _row_of(table: Visit, first: Tensor) -> tuple[str | None, int]:
    """Returns the parameter of a table that has a row for each position, and which row is the first position's."""
    for name, weight in table.module._parameters.items():
        if weight is not None and weight.ndim == 2 and weight.shape[1] == first.shape[0]:
            far = (weight.detach().double() - first.double()).abs().amax(-1)
            if float(far.min()) < 1e-6:
                return name, int(far.argmin())
    return None, 0


def _is_one_vector(visit: Visit) -> bool:
    assert visit.left is not None, "calls without an output are left out"
    rows = visit.left.reshape(-1, visit.left.shape[-1])
    return same(rows[:1].expand_as(rows), rows)


def _subsets(tables: Sequence[Visit]) -> list[list[Visit]]:
    """Returns none, one, two, and three of the tables, the last ones first."""
    ordered = list(reversed(tables))
    pairs = [[a, b] for i, a in enumerate(ordered) for b in ordered[i + 1 :]]
    whole = [ordered] if len(ordered) == 3 else []
    return [[], *([one] for one in ordered), *pairs, *whole]


def _is_token_free(visit: Visit, total: Tensor) -> bool:
    """Whether a call gives the same vectors for all rows, as wide as a sum."""
    left = visit.left
    if left is None or not left.is_floating_point() or left.ndim not in (2, 3) or left.shape[-1] != total.shape[-1]:
        return False
    if left.shape[-2] not in (1, total.shape[1]) or (left.ndim == 3 and left.shape[0] not in (1, total.shape[0])):
        return False
    return left.ndim == 2 or same(left[:1].expand_as(left), left)


def _spread(visit: Visit, total: Tensor) -> Tensor:
    assert visit.left is not None, "calls without an output are left out"
    return visit.left.expand(total.shape)


def _is_lookup(visit: Visit) -> bool:
    weight = visit.module._parameters.get("weight")
    indices = visit.entered is not None and not visit.entered.is_floating_point()
    return indices and weight is not None and weight.ndim == 2 and visit.left is not None


def _equals(entered: Tensor | None, ids: Tensor) -> bool:
    return entered is not None and entered.shape == ids.shape and bool((entered == ids).all())
