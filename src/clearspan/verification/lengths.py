"""Lengths at which a model does something else: windows, chunks, choices of keys; and how many tokens are tried."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from clearspan._forward.given import counting
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import InputError
from clearspan.model import Model
from clearspan.verification.report import Check
from clearspan.verification.trial import Level, Trial

SHORT = 12
"""Tokens in a row, where no window asks for more."""
MOST: Mapping[Level, int] = {"quick": 48, "full": 512}
"""Tokens in a row, at most."""
BEYOND = 4
"""Tokens past a window."""

_LIMITS = {
    "sliding_window": "a sliding window",
    "sliding_window_size": "a sliding window",
    "attention_window": "a sliding window",
    "window_size": "a sliding window",
    "local_attention_window_size": "a local window",
    "attention_chunk_size": "a chunk of attention",
    "chunk_size": "a chunk",
    "index_topk": "a choice of keys",
    "block_size": "a block of attention",
}
"""Entries of configs that say from which length on attention is another one."""


def limits(hf: Mapping[str, Any]) -> dict[str, int]:
    """Returns the entries of a config that say from which length on attention is another one."""
    if hf.get("use_sliding_window") is False:
        hf = {name: value for name, value in hf.items() if name != "sliding_window"}
    return {name: hf[name] for name in _LIMITS if isinstance(hf.get(name), int) and hf[name] > 1}


def length_for(cfg: TransformerBridgeConfig, level: Level) -> int:
    """Returns how many tokens of a row go past each limit that is near enough."""
    near = [limit + BEYOND for limit in limits(cfg.hf).values() if limit + BEYOND <= MOST[level]]
    length = min(max([SHORT, *near]), cfg.n_ctx - 1 if cfg.is_limited else MOST[level])
    # As many tokens as heads would let one axis pass for the other.
    return length + 1 if length in (cfg.n_heads, cfg.n_key_value_heads) else length


def lengths(trial: Trial) -> Iterator[Check]:
    """Yields the check of the context's end, and notes the limits that the tokens do not reach."""
    length = trial.tokens.shape[1]
    for name, limit in limits(trial.model.cfg.hf).items():
        if limit >= length:
            trial.skip(
                f"lengths past {name}={limit}, {_LIMITS[name]}: the inputs have {length} tokens; verify(tokens=...) "
                "with longer rows tries it"
            )
    yield from _context(trial.model, trial)


def _context(model: Model, trial: Trial) -> Iterator[Check]:
    """Yields whether the model itself ends where the adapter says that it does."""
    cfg = model.cfg
    longest = cfg.n_ctx + 1
    if longest > 2 * MOST["quick"] or model.device.type != "cpu":  # an index past a table ends a GPU's program
        trial.skip(f"inputs longer than the context of {cfg.n_ctx} tokens")
        return
    counted = counting(model)
    any_token = 1 if counted is not None and counted.padding_id == 0 else 0
    tokens = torch.full((1, longest), any_token, device=model.device)
    try:
        model.hf_model(tokens, use_cache=False)
        ends = False
    except (LookupError, RuntimeError, ValueError, InputError):
        ends = True
    found = "takes no" if ends else "takes"
    why = "" if ends == cfg.is_limited else f"The model itself {found} input of {longest} tokens: `has_table` is wrong."
    said = "ends" if cfg.is_limited else "does not end"
    yield Check("structure", f"the context {said} at {cfg.n_ctx} tokens", not why, explanation=why)
