"""What a sweep takes of memory: by token and row of a batch, and for the run that all batches go on from."""

from collections.abc import Iterable

import torch

from clearspan.bridge.free_memory import free_bytes
from clearspan.config import TransformerBridgeConfig
from clearspan.sweep.readings import Readings

UNKNOWN = 2**32
"""Bytes that a batch may take where the device does not say what is free."""


def half_of_free(device: torch.device) -> int:
    """Returns half of the bytes that are free on a device."""
    free = free_bytes(device)
    return UNKNOWN if free is None else free // 2


def bytes_per_token(cfg: TransformerBridgeConfig, length: int, names: Iterable[str]) -> int:
    """Returns what one token of a batch takes while a block runs, at the most.

    Args:
        cfg: The model's sizes.
        length: Positions of the whole sequence.
        names: Hook points that are written: scores and patterns are there as a whole only where one of them is.
    """
    is_watched = any(name.endswith(("hook_pattern", "hook_attn_scores")) for name in names)
    stream, hidden = 8 * cfg.d_model, 3 * cfg.d_mlp
    heads = 2 * cfg.n_heads * cfg.d_head + 2 * _kv_width(cfg)
    return _item(cfg) * (stream + hidden + heads + is_watched * 3 * cfg.n_heads * length)


def bytes_per_row(cfg: TransformerBridgeConfig, length: int, readings: Readings, *, has_prefix: bool) -> int:
    """Returns what a row of a batch takes besides its tokens: logits, and a layer's copy of earlier keys and values."""
    columns = cfg.d_vocab if readings.tokens is None else len(readings.tokens)
    logits = len(readings.positions) * columns * (2 * _item(cfg) + 4)
    return logits + has_prefix * _item(cfg) * length * _kv_width(cfg)


def bytes_of_base(cfg: TransformerBridgeConfig, rows: int, length: int, depths: int, *, has_prefix: bool) -> int:
    """Returns what is kept of the run that others go on from: streams at some depths, keys and values, logits."""
    prefix = has_prefix * cfg.n_layers * _kv_width(cfg)
    return rows * length * _item(cfg) * (depths * cfg.d_model + prefix + cfg.d_vocab)


def _kv_width(cfg: TransformerBridgeConfig) -> int:
    return 2 * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head


def _item(cfg: TransformerBridgeConfig) -> int:
    return torch.finfo(cfg.dtype).bits // 8
