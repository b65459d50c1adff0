"""Parts of a block that add nothing to the residual stream: they make something that another sublayer reads with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from clearspan.components import GeneralizedComponent, OpaqueBridge
from clearspan.structure.algebra import linear_kind, norm_kind, same
from clearspan.structure.attention import Attention
from clearspan.structure.attention_templates import attention_template
from clearspan.structure.finding import Findings, MissingStructureError
from clearspan.structure.mixing import mixes_positions
from clearspan.structure.mlp import find_mlp
from clearspan.structure.templates import linear_template, norm_template
from clearspan.structure.trace import Trace, Visit
from clearspan.structure.wiring import Contribution


@dataclass
class Feeders:
    """Parts that lead to what a sublayer reads besides the stream.

    Attributes:
        parts: Their templates by name, in the order of the forward, and those of the norms before them.
        names: The names of those that are no norms; the output of the last one is what is read.
    """

    parts: dict[str, GeneralizedComponent] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


def find_feeders(
    trace: Trace, block: Visit, feed: Visit, attentions: Sequence[Attention], findings: Findings, where: str
) -> Feeders:
    """Returns the parts of a block that lead to a call, whose output is added to what a sublayer reads.

    Args:
        trace: The traced forward.
        block: The block's call.
        feed: The call.
        attentions: The block's attentions that come before it.
        findings: Where to say what was found.
        where: The block's canonical path.

    Raises:
        MissingStructureError: An attention is laid out in no way that components know.
    """
    found = Feeders()
    before = [one for one in trace.inside(block) if one.order <= feed.order and block.path != one.path]
    width = 0 if block.entered is None else block.entered.shape[-1]
    for attention in attentions:
        part = attention_template(attention, trace, block, findings, where)
        entered = attention.reader.entered
        part.d_input = None if entered is None or entered.shape[-1] == width else entered.shape[-1]
        part.__post_init__()
        _add(found, "attn", part, attention.reader, before, block, width)
    after = max((one.output.order for one in attentions), default=block.order)
    whole = _between(before, after, feed)
    if whole is not None:
        kind, part = _whole(trace, block, whole, findings, where)
        _add(found, kind, part, whole, before, block, width)
    if whole is None or not same(whole.left, feed.left):
        name = feed.path.removeprefix(f"{block.path}.")
        part = linear_template(feed, name) if linear_kind(feed) else OpaqueBridge(name)
        _add(found, "feed", part, feed, before, block, width)
    findings.add(f"{where}.{found.names[-1]}", f"{feed.path} gives what is added to the stream that the mixer reads")
    return found


def _add(
    found: Feeders,
    kind: str,
    part: GeneralizedComponent,
    reader: Visit,
    before: Sequence[Visit],
    block: Visit,
    width: int,
) -> None:
    """Adds a part, with the norm that it reads through."""
    number = sum(name.rstrip("23456789") == kind for name in found.names)
    name = f"{kind}{number + 1}" if number else kind
    norm = next((one for one in before if norm_kind(one) and same(one.left, reader.entered)), None)
    if norm is not None and not norm.is_in(f"{block.path}.{part.name}"):
        path = norm.path.removeprefix(f"{block.path}.")
        found.parts[f"{name}_norm"] = norm_template(norm, path, d_model=width)
    found.parts[name] = part
    found.names.append(name)


def _between(before: Sequence[Visit], after: int, feed: Visit) -> Visit | None:
    """Returns the call of the outermost module with parts that begins after a call, and ends before another."""
    there = [one for one in before if one.order > after and one.module._modules and not feed.is_in(one.path)]
    there = [one for one in there if one.order < feed.order]
    return min(there, key=lambda one: (one.depth, one.order)) if there else None


def _whole(
    trace: Trace, block: Visit, whole: Visit, findings: Findings, where: str
) -> tuple[str, GeneralizedComponent]:
    """Returns the kind and the template of an MLP; of what mixes positions, or has maps not told apart, its ends."""
    name = whole.path.removeprefix(f"{block.path}.")
    if mixes_positions(whole, *block.size):
        findings.add(f"{where}.mixer2", f"only the ends of {whole.path} are known: positions mix in it")
        return "mixer2", OpaqueBridge(name, output_is_overwritten=whole.is_overwritten)
    inside = trace.inside(whole)
    assert whole.left is not None, "calls without an output are left out"
    source = [whole, *(one for one in inside if same(one.left, whole.left))]
    added = Contribution(source, whole.left, source=source)
    try:
        part, _ = find_mlp(trace, block, whole, added, inside, findings, where)
    except MissingStructureError as error:
        findings.add(f"{where}.mlp", f"only the ends of {whole.path} are known: {error}")
        part = OpaqueBridge(name, output_is_overwritten=whole.is_overwritten)
    return "mlp", part
