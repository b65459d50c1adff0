"""What lies around the blocks: how tokens become the residual stream, and how the stream becomes logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clearspan.components import (
    EmbeddingBridge,
    GeneralizedComponent,
    LinearBridge,
    NormalizationBridge,
    PosEmbedBridge,
    TransposedLinearBridge,
    UnembeddingBridge,
)
from clearspan.points import Layout
from clearspan.structure.algebra import LinearKind, coefficients, factor, linear_kind, norm_kind, rounded, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.trace import Trace, Visit


@dataclass(frozen=True)
class Blocks:
    """The list of blocks.

    Attributes:
        path: Its path.
        visits: The call of each block.
    """

    path: str
    visits: tuple[Visit, ...]

    @property
    def first(self) -> Tensor:
        """The residual stream that enters the first block."""
        assert self.visits[0].entered is not None, "a block reads the stream"
        return self.visits[0].entered

    @property
    def last(self) -> Tensor:
        """The residual stream that leaves the last block."""
        assert self.visits[-1].left is not None, "a block returns the stream"
        return self.visits[-1].left


def find_blocks(model: nn.Module, trace: Trace) -> Blocks:
    """Returns the longest list of modules that hand one tensor on, each to the next.

    Raises:
        MissingStructureError: There is none.
    """
    found: list[Blocks] = []
    streams: set[int] = set()
    for path, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or not len(modules):
            continue
        calls = [trace.at(f"{path}.{index}") for index in range(len(modules))]
        if all(len(one) == 1 for one in calls):
            visits = tuple(one[0] for one in calls)
            streams |= {visit.left.ndim for visit in visits if visit.left is not None}
            if _is_chain(visits):
                found.append(Blocks(path, visits))
    if not found:
        axes = f"; lists of modules hand on tensors of {sorted(streams)} axes" if streams else ""
        raise MissingStructureError(f"no list of blocks hands one residual stream on{axes}")
    return max(found, key=lambda one: (len(one.visits), -one.path.count(".")))


def _is_chain(visits: Sequence[Visit]) -> bool:
    tensors = [(visit.entered, visit.left) for visit in visits]
    if any(a is None or b is None or a.shape != b.shape or a.ndim != 3 for a, b in tensors):
        return False
    return all(same(before[1], after[0]) for before, after in zip(tensors, tensors[1:], strict=False))


@dataclass(frozen=True)
class Inward:
    """How tokens become the residual stream.

    Attributes:
        parts: Components by canonical name, in the order of the forward.
        numbers_positions: Whether the model numbers positions by the padding mask or the ids.
    """

    parts: dict[str, GeneralizedComponent]
    numbers_positions: bool = False


def find_inward(trace: Trace, blocks: Blocks, ids: Tensor, findings: Findings) -> Inward:
    """Returns the embeddings, and what lies between them and the first block.

    Raises:
        MissingStructureError: The stream is no sum of embeddings, as it is or through a norm or a linear map.
    """
    before = [visit for visit in trace.visits[: blocks.visits[0].order] if visit.left is not None]
    embed = next((one for one in before if _is_lookup(one) and _equals(one.entered, ids)), None)
    if embed is None:
        raise MissingStructureError("no module looks the token ids up")
    assert embed.left is not None, "calls without an output are left out"
    whole = blocks.first
    scale = factor(embed.left, whole)
    if scale is not None:
        findings.add("hook_embed", f"{embed.path} gives the stream that enters the blocks", scale)
        return Inward({"embed": _embedding(embed, scale)})
    norm = next((one for one in reversed(before) if same(one.left, whole) and norm_kind(one)), None)
    total = whole if norm is None or norm.entered is None else norm.entered
    parts = _summed(before, embed, total, ids, findings)
    if norm is None:
        return parts
    return _normed(parts, norm, findings)


def _normed(inward: Inward, norm: Visit, findings: Findings) -> Inward:
    findings.add("embed_norm", f"{norm.path} norms what the embeddings add up to")
    embed = inward.parts["embed"]
    if len(inward.parts) == 1 and isinstance(embed, EmbeddingBridge):
        embed.ends_at = norm.path  # the norm of the token embedding alone is what it adds
    return Inward({**inward.parts, "embed_norm": norm_template(norm, norm.path)}, inward.numbers_positions)


def _summed(before: Sequence[Visit], embed: Visit, total: Tensor, ids: Tensor, findings: Findings) -> Inward:
    """Returns the embeddings that add up to a tensor."""
    token, inner = embed, {}
    if embed.left is not None and embed.left.shape[-1] != total.shape[-1]:
        token = next((one for one in before if same(one.entered, embed.left) and linear_kind(one)), embed)
        inner = {"project_in": _linear(token)}
    others = [one for one in before if one not in (embed, token) and _is_token_free(one, total)]
    tables = [one for one in others if _is_lookup(one)] or others
    for chosen in _subsets(tables):
        found = coefficients([_spread(one, total) for one in (token, *chosen)], total)
        if found is not None and all(abs(one - 1) < 1e-4 for one in found[1:]):
            template = _embedding(embed, found[0])
            template.ends_at = token.path if token is not embed else None
            names = ", ".join(one.path for one in (token, *chosen))
            findings.add("hook_embed", f"{names} add up to it", found[0])
            return _with_tables({"embed": template, **inner}, chosen, ids)
    raise MissingStructureError("the residual stream is no sum of embeddings' outputs")


def _with_tables(parts: dict[str, GeneralizedComponent], tables: Sequence[Visit], ids: Tensor) -> Inward:
    numbers = False
    for table in tables:
        assert table.left is not None, "calls without an output are left out"
        rows = table.left.reshape(-1, table.left.shape[-2], table.left.shape[-1])[0]
        if same(rows[:1].expand_as(rows), rows):
            parts["type_embed"] = GeneralizedComponent(name=table.path)
            continue
        positions = _positions(table, ids.shape[1])
        start = 0 if positions is None else int(positions[0])
        numbers |= start > 0 or positions is None
        offset = _offset(table, rows) if positions is None else start
        parts["pos_embed"] = PosEmbedBridge(
            name=table.path, offset=offset, input_is_positions=positions is not None
        )
    return Inward(parts, numbers)


def _positions(table: Visit, length: int) -> Tensor | None:
    """Returns the positions that a table is asked for, or None where it is asked for something else."""
    entered = table.entered
    if entered is None or entered.is_floating_point() or entered.shape[-1] != length:
        return None
    row = entered.reshape(-1, length)[0]
    return row if bool((row.diff() == 1).all()) else None


def _offset(table: Visit, rows: Tensor) -> int:
    """Returns the row of a table that is looked up first."""
    weight = table.module._parameters.get("weight")
    if weight is None:
        return 0
    found = (weight.detach().double() - rows[0].double()).abs().amax(-1)
    return int(found.argmin())


def _subsets(tables: Sequence[Visit]) -> list[list[Visit]]:
    """Returns one, two, and three of the tables, the last ones first."""
    ordered = list(reversed(tables))
    pairs = [[a, b] for i, a in enumerate(ordered) for b in ordered[i + 1 :]]
    whole = [ordered] if len(ordered) == 3 else []
    return [[], *([one] for one in ordered), *pairs, *whole]


def _is_token_free(visit: Visit, total: Tensor) -> bool:
    """Whether a call gives the same vectors for all rows, as wide as the stream."""
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


def _embedding(embed: Visit, scale: float) -> EmbeddingBridge:
    return EmbeddingBridge(name=embed.path, multiplier=scale, output_is_overwritten=embed.is_overwritten)


@dataclass(frozen=True)
class Outward:
    """How the residual stream becomes logits.

    Attributes:
        parts: Components by canonical name, in the order of the forward.
        scale: What the unembedding's output is multiplied by.
        cap: Where it is capped by `cap * tanh(logits / cap)`, or None.
    """

    parts: dict[str, GeneralizedComponent]
    scale: float = 1.0
    cap: float | None = None


def find_outward(trace: Trace, blocks: Blocks, logits: Tensor, findings: Findings) -> Outward:
    """Returns the final norm, the unembedding, and what lies between them.

    Raises:
        MissingStructureError: Logits are no linear map's output, as it is, scaled, or capped.
    """
    after = [
        one
        for one in trace.visits[blocks.visits[-1].order + 1 :]
        if one.left is not None and not one.is_in(blocks.path)
    ]
    unembed = next((one for one in reversed(after) if one.left.shape[-1] == logits.shape[-1] and linear_kind(one)), None)
    if unembed is None or unembed.left is None:
        raise MissingStructureError("no linear map gives the logits")
    scale, cap = _scale_and_cap(unembed.left, logits)
    norm = next((one for one in after if same(one.entered, blocks.last) and norm_kind(one)), None)
    parts: dict[str, GeneralizedComponent] = {}
    if norm is not None:
        parts["ln_final"] = norm_template(norm, norm.path)
        findings.add("ln_final", f"{norm.path} norms the stream that leaves the blocks")
    between = [one for one in after if one.order < unembed.order and one is not norm and one.module._parameters]
    stream = blocks.last if norm is None else norm.left
    for visit in between:
        name = "project_out" if len(between) == 1 and linear_kind(visit) and same(visit.entered, stream) else None
        parts[name or f"head_{visit.path.rpartition('.')[2]}"] = opaque(visit, visit.path)
    parts["unembed"] = UnembeddingBridge(name=unembed.path)
    findings.add("hook_logits", f"{unembed.path} gives them", scale)
    return Outward(parts, scale, cap)


def _scale_and_cap(raw: Tensor, logits: Tensor) -> tuple[float, float | None]:
    scale = factor(raw, logits)
    if scale is not None:
        return scale, None
    cap = _cap(raw.double().reshape(-1), logits.double().reshape(-1))
    if cap is None or not same((cap * torch.tanh(raw.double() / cap)).to(logits.dtype), logits):
        raise MissingStructureError("logits are not the unembedding's output, scaled or capped")
    return 1.0, rounded(cap)


def _cap(raw: Tensor, capped: Tensor) -> float | None:
    """Returns the cap by which the largest value became what it is, or None where it became no smaller."""
    largest = int(raw.abs().argmax())
    value, result = float(raw[largest].abs()), float(capped[largest].abs())
    if not 0 < result < value:
        return None
    low, high = result, 1e6
    for _ in range(200):
        middle = (low * high) ** 0.5
        reached = middle * float(torch.tanh(torch.tensor(value / middle, dtype=torch.float64)))
        low, high = (middle, high) if reached < result else (low, middle)
    return high


# --- templates -------------------------------------------------------------------------------------------------------


def norm_template(visit: Visit, name: str, layout: Layout = Layout.TOKENS) -> NormalizationBridge:
    """Returns the template of a norm of the stream."""
    kind = norm_kind(visit)
    assert kind is not None, "the caller found a norm"
    return NormalizationBridge(name=name, uses_rms_norm=kind.is_rms, weight_offset=kind.offset, layout=layout)


def linear_template(visit: Visit, name: str, layout: Layout = Layout.TOKENS) -> LinearBridge:
    """Returns the template of a linear map."""
    kind = linear_kind(visit)
    assert isinstance(kind, LinearKind), "the caller found a linear map"
    return (TransposedLinearBridge if kind.is_transposed else LinearBridge)(name=name, layout=layout)


def _linear(visit: Visit) -> LinearBridge:
    return linear_template(visit, visit.path)


def opaque(visit: Visit, name: str) -> GeneralizedComponent:
    """Returns a template that gives a module ends, and says no more of it."""
    if norm_kind(visit) is not None:
        return norm_template(visit, name)
    return linear_template(visit, name) if linear_kind(visit) else GeneralizedComponent(name=name)
