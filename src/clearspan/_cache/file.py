"""Caches as files: one safetensors file each, with all that is not a tensor as JSON in its metadata.

A file holds raw tensors and views of them, so that shared storage is written once. Reading it takes a model of the same
architecture and sizes, whose hook points say how the raw tensors show.
"""

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from clearspan.checks import dtype_of, path_of
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import InvalidArgumentError
from clearspan.files import replacing
from clearspan.hf.attention import StoredCall
from clearspan.hf.recording import Contents
from clearspan.hf.storages import View, packed
from clearspan.inputs import Batch

_FORMAT = "clearspan activation cache 2"
_SIZES = ("architecture", "n_layers", "d_model", "n_heads", "d_head", "n_key_value_heads", "d_mlp", "d_vocab")

Places = list[int] | int | None
"""Places that are shown of an axis: some, one without its axis, or all."""


@dataclass(frozen=True)
class StoredCache:
    """What a file has of a cache.

    Attributes:
        points: Names of its hook points.
        rows: Rows of the run.
        rows_shown: Which of them it shows.
        positions_shown: Which positions of those that were kept.
        contents: What its recording holds.
        gradients: Gradients by their point's name.
        checksums: Of the weights that it computes with, by their name.
        batch: The run's rows.
    """

    points: list[str]
    rows: int
    rows_shown: Places
    positions_shown: Places
    contents: Contents
    gradients: Mapping[str, Tensor]
    checksums: Mapping[str, int]
    batch: Batch

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by the names that they have in the file's table."""
        calls = {
            _in_call(path, name): tensor
            for path, call in self.contents.calls.items()
            for name, tensor in call.tensors.items()
        }
        gradients = {f"{name}_grad": gradient for name, gradient in self.gradients.items()}
        return {**self.contents.raw, **self.contents.values, **calls, **gradients}


def _facts_of(batch: Batch) -> dict[str, Any]:
    tokens, mask = (None if one is None else one.tolist() for one in (batch.tokens, batch.mask))
    return {"tokens": tokens, "mask": mask, "rows": batch.rows, "width": batch.width}


def _batch(facts: Mapping[str, Any]) -> Batch:
    mask = None if facts["mask"] is None else torch.tensor(facts["mask"])
    if facts["tokens"] is None:
        return Batch(None, mask, embeds=torch.empty(facts["rows"], facts["width"], 0))
    return Batch(torch.tensor(facts["tokens"]), mask)


def _in_call(path: str, name: str) -> str:
    return f"{path}:{name}"


def write(stored: StoredCache, path: str | Path, cfg: TransformerBridgeConfig) -> None:
    """Writes a cache of a model with this config to a file.

    Raises:
        InvalidArgumentError: Its tensors have no values.
    """
    tensors = stored.tensors()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise InvalidArgumentError("a cache on the meta device cannot be saved", reason="it has no values")
    written, views = packed(tensors)
    autocast = stored.contents.autocast
    facts = {
        "sizes": _sizes(cfg),
        "points": stored.points,
        "rows": stored.rows,
        "rows_shown": stored.rows_shown,
        "positions_shown": stored.positions_shown,
        "raw": list(stored.contents.raw),
        "values": list(stored.contents.values),
        "gradients": list(stored.gradients),
        "calls": {
            path: {"tensors": list(call.tensors), "settings": call.settings, "parameters": call.parameters}
            for path, call in stored.contents.calls.items()
        },
        "checksums": stored.checksums,
        "batch": _facts_of(stored.batch),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "views": {name: astuple(view) for name, view in views.items()},
    }
    with replacing(path) as new:
        save_file(written, new, {"format": _FORMAT, "model": cfg.model_name, "cache": json.dumps(facts)})


def read(path: str | Path, cfg: TransformerBridgeConfig, device: torch.device | str) -> StoredCache:
    """Returns what a file has of a cache of a model with this config.

    Raises:
        InvalidArgumentError: The file is no cache, or one of a model of another architecture or size.
        FileNotFoundError: There is no such file.
    """
    path = path_of(path)
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            facts = _facts(metadata, path, cfg)
            written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except safetensors.SafetensorError as error:
        raise _no_cache(Path(path), f"no safetensors file ({error})") from error
    tensors = {name: View(*view).seen(written[view[0]]) for name, view in facts["views"].items()}
    calls = {
        path: StoredCall(
            {name: tensors[_in_call(path, name)] for name in call["tensors"]}, call["settings"], call["parameters"]
        )
        for path, call in facts["calls"].items()
    }
    raw, values = ({name: tensors[name] for name in facts[kind]} for kind in ("raw", "values"))
    return StoredCache(
        facts["points"],
        facts["rows"],
        facts["rows_shown"],
        facts["positions_shown"],
        Contents(raw, values, calls, None if facts.get("autocast") is None else dtype_of(facts["autocast"])),
        {name: tensors[f"{name}_grad"] for name in facts["gradients"]},
        facts["checksums"],
        _batch(facts["batch"]),
    )


def _facts(metadata: Mapping[str, str], path: Path, cfg: TransformerBridgeConfig) -> dict[str, Any]:
    """Returns what a file's metadata say, checked to be of a cache of such a model."""
    if metadata.get("format") != _FORMAT:
        raise _no_cache(path, f"format {metadata.get('format')!r}")
    facts = json.loads(metadata["cache"])
    own = _sizes(cfg)
    other = {name: size for name, size in facts["sizes"].items() if own[name] != size}
    if other:
        raise InvalidArgumentError(
            f"{path.name} is of another model than the bridge's",
            expected=", ".join(f"{name} {own[name]}" for name in other),
            got=", ".join(f"{name} {size}" for name, size in other.items()),
            where=f"a cache of {metadata['model'] or facts['sizes']['architecture']}",
        )
    return facts


def _no_cache(path: Path, got: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{path.name} is no activation cache",
        expected=f"a file written by cache.save, of format {_FORMAT!r}",
        got=got,
    )


def _sizes(cfg: TransformerBridgeConfig) -> dict[str, str | int | None]:
    return {name: getattr(cfg, name) for name in _SIZES}
