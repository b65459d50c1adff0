"""Pins: checks that fail because of transformers itself, each with a measurement of the bare model that shows it.

A pinned check may fail. One that holds again is reported, so that its pin goes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from clearspan.hf.keywords import takes_position_ids
from clearspan.verification import Check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Fault = Callable[["PreTrainedModel"], float]
"""Measures on a bare model, without this library, how far it is from what it should compute: 0 is no fault."""


@dataclass(frozen=True)
class Pin:
    """Checks that fail for a reason in transformers.

    Attributes:
        model_types: The model types in which they fail.
        group: The group of the checks.
        what: A pattern of what the checks say, with `*` for what varies.
        reason: What transformers does wrong.
        fault: Measures that on a bare model.
    """

    model_types: tuple[str, ...]
    group: str
    what: str
    reason: str
    fault: Fault

    def covers(self, check: Check) -> bool:
        """Whether a check is one of the pinned ones."""
        return check.group == self.group and fnmatchcase(check.what, self.what)


def padded_on_the_left(model: "PreTrainedModel") -> float:
    """Returns how far the logits of a row padded on the left are from those of the row alone.

    The bare model is told the mask, and the positions of real tokens where its forward takes positions.

    Returns:
        The largest difference over the largest logit; infinite where the forward raises.
    """
    return _padded(model, slice(-_REAL, None))


def padded_on_the_right(model: "PreTrainedModel") -> float:
    """Returns how far the logits of a row padded on the right are from those of the row alone, as above."""
    return _padded(model, slice(0, _REAL))


def counted_from_the_left(model: "PreTrainedModel") -> float:
    """Returns how far what a position table gives for a row padded on the left is from what it gives for the row alone.

    The table is the module called `embed_positions`, which gives the same for all rows.
    """
    table = next(module for path, module in model.named_modules() if path.endswith("embed_positions"))
    row = torch.randint(3, model.config.vocab_size, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(row)
    mask[:, :-_REAL] = 0
    seen: list[Tensor] = []
    handle = table.register_forward_hook(lambda _module, _args, output: seen.append(output[-_REAL:]))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        model(row[:, -_REAL:], use_cache=False)
        model(row, attention_mask=mask, use_cache=False)
    return _distance(seen[1], seen[0])


def cannot_generate(model: "PreTrainedModel") -> float:
    """Returns infinity where `generate` of the bare model raises on a few tokens, and 0 where it does not."""
    row = torch.arange(3, 3 + _REAL)[None]
    try:
        cast("Any", model).generate(row, max_new_tokens=3, do_sample=False)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return float("inf")
    return 0.0


_REAL, _LENGTH = 9, 12


def _padded(model: "PreTrainedModel", place: slice) -> float:
    config = model.config.get_text_config()
    row = torch.randint(3, config.vocab_size, (1, _REAL), generator=torch.Generator().manual_seed(0))
    tokens = torch.full((1, _LENGTH), vars(config).get("pad_token_id") or 0)
    mask = torch.zeros_like(tokens)
    tokens[:, place], mask[:, place] = row, 1
    given = [{"attention_mask": mask}]
    if takes_position_ids(model):
        given.append({"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)})
    with torch.no_grad():
        alone = model(row, use_cache=False).logits
        found = (_logits(model, tokens, keywords) for keywords in given)
        return min(float("inf") if one is None else _distance(one[:, place], alone) for one in found)


def looks_ahead(model: "PreTrainedModel") -> float:
    """Returns how far logits of tokens are from those of the same tokens with more behind them, over the largest."""
    size = model.config.get_text_config().vocab_size
    row = torch.randint(3, size, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return _distance(model(row, use_cache=False).logits[:, :_REAL], model(row[:, :_REAL], use_cache=False).logits)


def mixes_rows_behind_a_state(model: "PreTrainedModel") -> float:
    """Returns how far two rows' next logits behind a state (RWKV's cache) are from those of one forward.

    Returns:
        The largest difference over the largest logit; infinite where they have another shape.
    """
    size = model.config.get_text_config().vocab_size
    rows = torch.randint(3, size, (2, _REAL), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        once = model(rows, use_cache=False).logits[:, -1:]
        state = model(rows[:, :-1], use_cache=True).state
        behind = model(rows[:, -1:], state=state, use_cache=True).logits
    return _distance(behind, once) if behind.shape == once.shape else float("inf")


def forgets_behind_the_window(model: "PreTrainedModel") -> float:
    """Returns how far logits behind a KV cache are from those of one forward, for a row longer than the window.

    Returns:
        The largest difference over the largest logit.
    """
    config = model.config.get_text_config()
    length = vars(config)["sliding_window"] + _LENGTH
    row = torch.randint(3, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        once = model(row, use_cache=False).logits[:, -1:]
        past = model(row[:, :-1], use_cache=True).past_key_values
        return _distance(model(row[:, -1:], past_key_values=past, use_cache=True).logits, once)


def _logits(model: "PreTrainedModel", tokens: Tensor, keywords: dict[str, Tensor]) -> Tensor | None:
    """Returns the logits of a forward, or None where the model cannot make it."""
    try:
        return model(tokens, use_cache=False, **keywords).logits
    except (LookupError, RuntimeError, ValueError):
        return None


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


_LENGTH_MATTERS = (
    "relative biases of its predicting streams are given to other positions, streams and heads than they were made "
    "for, and to others for each length of the input"
)

PINS: tuple[Pin, ...] = (
    Pin(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "plbart",
            "trocr",
        ),
        "padding",
        "row of * tokens padded on the left to *",
        "positions are counted from the left end of the padded row, and its forward takes no others",
        padded_on_the_left,
    ),
    Pin(
        ("musicgen", "musicgen_melody"),
        "generation",
        "a short generation",
        "its own `generate` raises unless it is told how many sequences to return, and where a generation starts",
        cannot_generate,
    ),
    Pin(
        ("roformer",),
        "padding",
        "blocks.0.attn.hook_rot_q of a row padded on the left counts real tokens",
        "rotations are counted from the left end of the padded row, and its forward takes no positions",
        counted_from_the_left,
    ),
    Pin(
        ("rwkv",),
        "generation",
        "a short generation",
        "behind a state it reads the state of each row as a position of every row: rows mix, and tokens become several",
        mixes_rows_behind_a_state,
    ),
    Pin(
        ("recurrent_gemma", "rwkv", "xlstm"),
        "padding",
        "row of * tokens padded on the left to *",
        "its recurrence takes padding in as it takes tokens: the mask does not reach it",
        padded_on_the_left,
    ),
    Pin(
        ("deepseek_v4", "llama4", "llama4_text", "minimax_m3_vl_text"),
        "padding",
        "row of * tokens padded on the left to *",
        "blocks of keys are counted from the left end of the padded row",
        padded_on_the_left,
    ),
    Pin(
        ("inkling_text",),
        "padding",
        "row of * tokens padded on the left to *",
        "queries are multiplied by the logarithm of how many keys there are, which counts those that are padded",
        padded_on_the_left,
    ),
    Pin(
        ("blt",),
        "padding",
        "row of * tokens padded on the left to *",
        "padding is cut into patches as bytes are",
        padded_on_the_left,
    ),
    Pin(
        ("blt",),
        "generation",
        "a short generation",
        "`generate` asks its config for a number of layers, which only the configs of its parts have",
        cannot_generate,
    ),
    Pin(
        ("reformer",),
        "padding",
        "row of * tokens padded on the left to *",
        "chunks and axes of positions are counted from the left end of the padded row",
        padded_on_the_left,
    ),
    Pin(
        ("reformer",),
        "generation",
        "a short generation",
        "its local attention cannot continue from its cache",
        cannot_generate,
    ),
    Pin(
        ("cpmant",),
        "padding",
        "row of * tokens padded on the right to *",
        "it takes tokens with the id 0 for padding, and masks as many on the left",
        padded_on_the_right,
    ),
    Pin(
        ("moshi",),
        "generation",
        "* of a generation is that of one forward",
        "its cache drops what lies behind the window, and its mask does not",
        forgets_behind_the_window,
    ),
    Pin(
        ("prophetnet",),
        "generation",
        "* of a generation is that of one forward",
        _LENGTH_MATTERS,
        looks_ahead,
    ),
    Pin(
        ("prophetnet",),
        "generation",
        "a write to * at one step changes the logits of that step",
        _LENGTH_MATTERS,
        looks_ahead,
    ),
)
"""All pins."""


def pins_of(model_type: str) -> Iterator[Pin]:
    """Yields the pins of a model type."""
    return (pin for pin in PINS if model_type in pin.model_types)
