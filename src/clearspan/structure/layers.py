"""Layers of several kinds in an adapter's text: each kind once, and which layer is of which."""

from collections.abc import Sequence
from dataclasses import dataclass

from clearspan.architectures import parts
from clearspan.components import MLPBridge, MoEBridge, PerLayer
from clearspan.structure.entries import Entries
from clearspan.structure.expression import Call, Code, Expression, value_of, written

SUBLAYERS = ("attn", "mixer", "mlp")


@dataclass(frozen=True)
class Statement:
    """An assignment to a local variable.

    Attributes:
        name: The variable.
        value: What it is.
    """

    name: str
    value: Expression


def layered(blocks: Sequence[Call], entries: Entries) -> tuple[list[Statement], Expression]:
    """Returns the expression of all blocks, and the assignments that it needs before it.

    Args:
        blocks: The call that makes each layer's block.
        entries: The config's entries.
    """
    if len({written(one) for one in blocks}) == 1:
        return [], blocks[0]
    first = blocks[0]
    differing = {
        key
        for one in blocks
        for key in {*one.kwargs, *first.kwargs}
        if key not in one.kwargs or key not in first.kwargs or written(one.kwargs[key]) != written(first.kwargs[key])
    }
    is_usual = all(one.function is parts.block for one in blocks)
    if not is_usual or not differing <= {key for key in SUBLAYERS if all(key in one.kwargs for one in blocks)}:
        statements, chosen = _chosen("kinds", blocks, [_block_name(one) for one in blocks], entries)
        return statements, chosen
    statements: list[Statement] = []
    kwargs = dict(first.kwargs)
    for key in (one for one in SUBLAYERS if one in differing):
        each = [one.kwargs[key] for one in blocks]
        more, kwargs[key] = _chosen(f"{key}s", each, [_part_name(key, one) for one in each], entries)
        statements += more
    return statements, Call(first.function, first.args, kwargs)


def _chosen(
    name: str, each: Sequence[Expression], names: Sequence[str], entries: Entries
) -> tuple[list[Statement], Call]:
    """Returns the kinds as assignments, and the choice of each layer's among them."""
    texts = [written(one) for one in each]
    kinds = list(dict.fromkeys(texts))
    numbers = [kinds.index(text) for text in texts]
    templates = [each[texts.index(text)] for text in kinds]
    for entry, values in entries.by_layer(len(each), name.rstrip("s")):
        pairs = dict.fromkeys((str(value), number) for value, number in zip(values, numbers, strict=True))
        if len(pairs) == len(kinds) == len({value for value, _ in pairs}) and all(
            isinstance(one, str) for one in values
        ):
            by_value = {value: templates[number] for value, number in pairs}
            choice = Code(f'[{name}[kind] for kind in cfg.hf["{entry}"]]', None)
            return [Statement(name, by_value)], Call(PerLayer, [choice])
    known = _distinct([names[texts.index(text)] for text in kinds])
    statements = [Statement(one, template) for one, template in zip(known, templates, strict=True)]
    listed = _listed(numbers, known, entries)
    if not isinstance(listed, Code):
        return statements, Call(PerLayer, [listed])
    return [*statements, Statement(name, listed)], Call(PerLayer, [Code(name, None)])


def _listed(numbers: Sequence[int], names: Sequence[str], entries: Entries) -> Expression:
    """Returns the list of the layers' kinds: by the number of first layers, by a period, or one by one."""
    count = next(index for index, number in enumerate(numbers) if number != numbers[0])
    if numbers == [0] * count + [1] * (len(numbers) - count):
        first = entries.count("dense", count)
        if isinstance(first, Code):
            chosen = f"{names[0]} if layer < {first.text} else {names[1]}"
            return Code(f"[{chosen} for layer in range(cfg.n_layers)]", None)
    for period in range(2, len(numbers) // 2 + 1):
        if len(numbers) % period == 0 and numbers == list(numbers[:period]) * (len(numbers) // period):
            unit = ", ".join(names[number] for number in numbers[:period])
            return Code(f"[{unit}] * {len(numbers) // period}", None)
    return [Code(names[number], None) for number in numbers]


def _block_name(block: Call) -> str:
    """Returns what a kind of block is called: by its sublayers."""
    there = [key for key in SUBLAYERS if key in block.kwargs]
    return "_".join(_part_name(key, block.kwargs[key]) if key == "mlp" else key for key in there) or "kind"


def _part_name(key: str, part: Expression) -> str:
    """Returns what a kind of sublayer is called."""
    if key == "attn" and isinstance(part, Call):
        return "rotated" if "rotary" in part.kwargs else "unrotated"
    made = value_of(part)
    return "sparse" if isinstance(made, MoEBridge) else "dense" if isinstance(made, MLPBridge) else f"{key}_part"


def _distinct(names: Sequence[str]) -> list[str]:
    """Returns names with a number for those that come again."""
    return [
        f"{name}{names[:index].count(name) + 1}" if name in names[:index] else name for index, name in enumerate(names)
    ]
