"""How the residual stream becomes logits: the final norm, the unembedding, and what lies between them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clearspan.components import GeneralizedComponent, LogitHeadBridge, UnembeddingBridge
from clearspan.structure.algebra import factor, linear_kind, norm_kind, same
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.frame import Blocks
from clearspan.structure.streams import collapse_template
from clearspan.structure.templates import call_number, norm_template, opaque
from clearspan.structure.trace import Trace, Visit


def find_outward(trace: Trace, blocks: Blocks, logits: Tensor, findings: Findings) -> dict[str, GeneralizedComponent]:
    """Returns the final norm, the unembedding, and what lies between them.

    Raises:
        MissingStructureError: Logits are no linear map's output, as it is, scaled, or capped.
    """
    after = [
        one
        for one in trace.visits[blocks.end + 1 :]
        if one.left is not None and not any(one.is_in(path) for path in blocks.lists)
    ]
    unembed, raw = _unembedding(after, logits)
    scale, cap = _scale_and_cap(raw, logits)
    norm = next((one for one in after if same(one.entered, blocks.last) and norm_kind(one)), None)
    parts: dict[str, GeneralizedComponent] = {}
    if blocks.streams is not None and blocks.collapsed is not None:
        parts["collapse"] = collapse_template(blocks.collapsed, blocks.streams)
        findings.add("collapse", f"{blocks.collapsed.path} makes one vector of the streams that leave the blocks")
        after = [one for one in after if not one.is_in(blocks.collapsed.path)]
    if norm is not None:
        last = norm_template(norm, norm.path)
        last.call = call_number(trace, norm)
        parts["ln_final"] = last
        findings.add("ln_final", f"{norm.path} norms the stream that leaves the blocks")
    stream = blocks.last if norm is None else norm.left
    parts |= _between([one for one in after if one.order < unembed.order and one is not norm], stream, unembed)
    kind = linear_kind(unembed)
    assert kind is not None, "found as a linear map"
    if kind.is_transposed:
        raise MissingStructureError(f"the unembedding {unembed.path} has its weight the other way round")
    n_logits = None if kind.outputs == logits.shape[-1] else logits.shape[-1]
    within = _input_scale(parts, norm or blocks.collapsed or blocks.visits[-1], after, unembed)
    parts["unembed"] = UnembeddingBridge(
        name=unembed.path, scale=scale, softcap=cap, input_scale=within, n_logits=n_logits
    )
    findings.add("hook_logits", f"{unembed.path} gives them", scale)
    return parts


def _unembedding(after: Sequence[Visit], logits: Tensor) -> tuple[Visit, Tensor]:
    """Returns the call of the map that gives the logits, and those of its outputs that they come from.

    Raises:
        MissingStructureError: There is no such map.
    """
    width = logits.shape[-1]
    maps = [one for one in reversed(after) if one.left is not None and one.left.shape[-1] >= width and linear_kind(one)]
    unembed = next(iter(sorted(maps, key=lambda one: one.left is not None and one.left.shape[-1] != width)), None)
    if unembed is None or unembed.left is None:
        raise MissingStructureError("no linear map gives the logits")
    return unembed, unembed.left[..., :width]


def _input_scale(
    parts: Mapping[str, GeneralizedComponent], last: Visit, after: Sequence[Visit], unembed: Visit
) -> float:
    """Returns what is multiplied by between the last call that gives a vector of each position and the unembedding.

    Raises:
        MissingStructureError: The unembedding reads something else.
    """
    if "head" in parts:
        return 1.0
    projection = parts.get("project_out")
    before = last if projection is None else next(one for one in after if one.path == projection.name)
    found = None if before.left is None or unembed.entered is None else factor(before.left, unembed.entered)
    if found is None:
        raise MissingStructureError(f"{unembed.path} reads no multiple of what {before.path} gives")
    return found


def _between(calls: Sequence[Visit], stream: Tensor | None, unembed: Visit) -> dict[str, GeneralizedComponent]:
    """Returns what lies between the stream, or its last norm, and the unembedding: a linear map, or a head."""
    inner = [one for one in calls if any(own is not None for own in one.module._parameters.values())]
    inner = [one for one in inner if not one.module._modules and _has_tokens(one, stream)]
    if not inner:
        return {}
    d_model = 0 if stream is None else stream.shape[-1]
    if len(inner) == 1 and linear_kind(inner[0]) and same(inner[0].entered, stream):
        return {"project_out": opaque(inner[0], inner[0].path, d_model)}
    whole = next((one for one in calls if one.module._modules and all(part.is_in(one.path) for part in inner)), None)
    narrow = whole is not None and whole.left is not None and stream is not None and whole.left.shape != stream.shape
    if whole is not None and (narrow or unembed.is_in(whole.path)):
        whole = None
    start = "" if whole is None else f"{whole.path}."
    parts = {
        one.path.removeprefix(start).replace(".", "_"): opaque(one, one.path.removeprefix(start), d_model)
        for one in inner
    }
    head = LogitHeadBridge(name=None if whole is None else whole.path, submodules=parts)
    return {"head": head}


def _has_tokens(visit: Visit, stream: Tensor | None) -> bool:
    """Whether a call gives a vector for each position."""
    return stream is not None and visit.left is not None and visit.left.shape[:2] == stream.shape[:2]


def _scale_and_cap(raw: Tensor, logits: Tensor) -> tuple[float, float | None]:
    scale = factor(raw, logits)
    if scale is not None:
        return scale, None
    cap = _cap(raw.double().reshape(-1), logits.double().reshape(-1))
    if cap is None or not same((cap * torch.tanh(raw.double() / cap)).to(logits.dtype), logits):
        raise MissingStructureError("logits are not the unembedding's output, scaled or capped")
    near = max(1e-3, 4 * torch.finfo(logits.dtype).eps)
    return 1.0, _simplest(cap, near, lambda one: same((one * torch.tanh(raw.double() / one)).to(logits.dtype), logits))


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


def _simplest(number: float, near: float, fits: Callable[[float], bool]) -> float:
    """Returns a number that was estimated to a relative error, with as few digits as fit."""
    for digits in range(1, 8):
        short = float(f"{number:.{digits}g}")
        if abs(short / number - 1) < near and fits(short):
            return short
    return number
