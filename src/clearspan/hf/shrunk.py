"""Small models of a model's own class: as many layers and the same parts, with narrow ones and random weights."""

import copy
import functools
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from clearspan.hf.drawn import draw, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LARGE = 200_000_000
"""Parameters from which on a model is large: a forward of a few tokens takes seconds on a CPU."""
MOST = 150_000_000
"""Parameters that a small model may have."""
TOKENS, EXPERTS, NARROW = 1009, 8, 8
"""How many tokens a small model knows, how many experts it has at least, and the least width of a head."""


def is_large(model: "PreTrainedModel") -> bool:
    """Whether a model is better studied on a small one: it is large, or its weights are not there in full precision."""
    parameters = list(model.parameters())
    rough = any(one.is_meta or not one.is_floating_point() or one.dtype.itemsize < 4 for one in parameters)
    return rough or sum(one.numel() for one in parameters) > LARGE


def shrunk(model: "PreTrainedModel") -> "PreTrainedModel | None":
    """Returns a small random model of a model's class and config class, on the CPU, in float32 and in eval mode.

    Widths and the numbers of heads are divided by powers of two, so that their ratios stay; it has fewer experts and
    knows fewer tokens. All else is as in the model's config, such as its number of layers and their kinds.

    Returns:
        The model, or None where its class cannot be built with such a config.
    """
    config = _shrunk_config(model.config)
    if config is None:
        return None
    try:
        with quiet(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(one.numel() for one in _made(model, copy.deepcopy(config)).parameters())
            small = _made(model, config) if size <= MOST else None
    except FAULTS:
        return None
    if small is not None:
        draw(small, torch.Generator().manual_seed(0))
        small.eval()
    return small


FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's class may raise for a config that nobody wrote."""


def _made(model: "PreTrainedModel", config: "PretrainedConfig") -> "PreTrainedModel":
    return type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager")


def _shrunk_config(config: "PretrainedConfig") -> "PretrainedConfig | None":
    """Returns a config with smaller sizes, or None where it does not say the width of the residual stream."""
    text = config.get_text_config(decoder=True)
    small = copy.deepcopy(config)
    width = getattr(text, "hidden_size", None)  # its name for the stream's width, whatever the config's own is
    if not isinstance(width, int):
        return None
    head = _head_factor(text, width)
    heads = _heads_factor(text, width // head)
    for part in _configs(small):
        for name, value in list(vars(part).items()):
            new = _smaller(name, value, head, heads, part)
            if new is not value:
                setattr(part, name, new)
        vars(part).pop("quantization_config", None)
    return small


def _configs(config: "PretrainedConfig") -> "Iterator[PretrainedConfig]":
    """Yields a config and those inside it."""
    yield config
    for name in config.sub_configs:
        part = vars(config).get(name)
        if part is not None:
            yield from _configs(part)


_HEADS = re.compile(r"(^|_)heads?$|^n(um)?_heads?(_|$)|_heads?_?(kv)?$")
_HEAD_WIDTHS = re.compile(r"head_?dim|d_head|head_size|d_kv$|rotary_dim|kv_channels")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_WIDTHS = re.compile(r"(size|dim|rank|width|inner|embd|d_model|d_ff|channels)$")
_OTHER_SIZES = re.compile(r"vocab|window|patch|image|kernel|chunk|block|state|group|conv|batch|sample|cache|head|rope")
_TOKEN_IDS = re.compile(r"token_(id|index)$")


def _smaller(name: str, value: Any, head: int, heads: int, config: "PretrainedConfig") -> Any:
    """Returns what an entry becomes; the same object where it stays."""
    if isinstance(value, list) and value and all(type(one) is int for one in value) and not name.startswith("_"):
        new = [_smaller(name, one, head, heads, config) for one in value]
        return new if new != value else value
    if isinstance(value, dict) and name.startswith("rope"):
        return _smaller_rotation(value, head)
    if type(value) is not int:
        return value
    if _TOKEN_IDS.search(name):
        return value % TOKENS if value >= TOKENS else value
    if "vocab" in name:
        return min(value, TOKENS)
    if name in _EXPERTS:
        return _experts(value, config)
    if _HEAD_WIDTHS.search(name):
        return _divided(value, head)
    if _HEADS.search(name):
        return value // heads if value % heads == 0 else value
    if _WIDTHS.search(name) and not _OTHER_SIZES.search(name):
        return _divided(value, head * heads)
    return value


def _divided(value: int, factor: int) -> int:
    """Returns a width divided by a factor, where that leaves a remainder or too little, the next fair width."""
    if value <= NARROW:
        return value
    return (
        value // factor
        if value % factor == 0 and value // factor >= NARROW
        else max(NARROW, 8 * -(-value // (8 * factor)))
    )


def _smaller_rotation(entries: dict[str, Any], head: int) -> dict[str, Any]:
    """Returns settings of a rotation for heads that are narrower: lists of frequencies, and sections of them."""
    new = dict(entries)
    for name, value in entries.items():
        if isinstance(value, dict):
            new[name] = _smaller_rotation(value, head)
        elif isinstance(value, list) and "section" in name:
            new[name] = [one // head for one in value]
        elif isinstance(value, list) and "factor" in name:
            new[name] = value[::head]
    return new if new != entries else entries


def _experts(count: int, config: "PretrainedConfig") -> int:
    """Returns how many experts are left: enough to choose as many of, in as many groups."""
    said = vars(config)
    chosen = max((said.get(name) or 1 for name in ("num_experts_per_tok", "moe_topk", "top_k", "moe_k")), default=1)
    groups = said.get("n_group") or 1
    least = max(EXPERTS, 2 * chosen, 2 * groups)
    while count % 2 == 0 and count // 2 >= least and (count // 2) % groups == 0:
        count //= 2
    return count


def _head_factor(text: "PretrainedConfig", width: int) -> int:
    """Returns the power of two that the widths of heads are divided by."""
    said = {name: value for name, value in vars(text).items() if type(value) is int}
    widths = [value for name, value in said.items() if _HEAD_WIDTHS.search(name) and value > NARROW]
    heads = getattr(text, "num_attention_heads", None)
    is_implied = not any(name in said for name in ("head_dim", "qk_nope_head_dim"))
    if is_implied and isinstance(heads, int) and heads and width % heads == 0:
        widths.append(width // heads)
    sections = [one for entries in _rotations(text) for one in entries]
    fits = [
        power
        for power in (2, 4, 8, 16, 32)
        if all(one % (2 * power) == 0 and one // power >= NARROW for one in widths)
        and all(one % power == 0 for one in sections)
        and width % power == 0
    ]
    return max(fits, default=1)


def _rotations(text: "PretrainedConfig") -> Iterator[list[int]]:
    """Yields the sections of the rotation's frequencies, where there are some."""
    for name, entries in vars(text).items():
        for one in (entries, *entries.values()) if isinstance(entries, dict) and name.startswith("rope") else ():
            for key, value in one.items() if isinstance(one, dict) else ():
                if "section" in key and isinstance(value, list):
                    yield [each for each in value if isinstance(each, int)]


def _heads_factor(text: "PretrainedConfig", width: int) -> int:
    """Returns the power of two that the numbers of heads are divided by."""
    counts = [
        one
        for name, value in vars(text).items()
        if _HEADS.search(name)
        for one in (value if isinstance(value, list) else [value])
        if type(one) is int and one > 1
    ]
    if not counts:
        return 2 ** max(0, min(4, int(math.log2(max(width // 64, 1)))))
    common = functools.reduce(math.gcd, [*counts, width])
    fits = [
        power
        for power in (2, 4, 8, 16)
        if common % power == 0 and min(counts) // power >= 2 and max(counts) // power >= 4
    ]
    return max(fits, default=1)
