"""Experiments as files: what was run on which model with which versions, so that it can be run again."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from clearspan.bridge import TransformerBridge
from clearspan.checks import path_of
from clearspan.errors import InvalidArgumentError
from clearspan.files import write_text
from clearspan.hf.adapters import settings
from clearspan.hf.loading import revision_of
from clearspan.inputs import Batch
from clearspan.interventions import Intervention
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.sweep.grid import Grid
from clearspan.sweep.metrics import LogitMetric, parse_metric

FORMAT = "clearspan experiment 1"
_AT_ONCE = 2**24
"""Values of a weight that are read at a time."""

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it was.

    Attributes:
        name: What was booted.
        architecture: Class of the Hugging Face model.
        revision: Of the files on the hub, where they came from there.
        dtype: Of the weights.
        fingerprint: Of all values of its parameters and stored buffers.
    """

    name: str
    architecture: str
    revision: str | None
    dtype: str
    fingerprint: str

    @classmethod
    def of(cls, bridge: TransformerBridge) -> Self:
        """Returns the identity of a bridge's model."""
        cfg = bridge.cfg
        return cls(
            cfg.model_name,
            cfg.architecture,
            revision_of(bridge.hf_model),
            str(cfg.dtype),
            fingerprint(bridge.hf_model),
        )


@dataclass(frozen=True)
class Inputs:
    """Token ids of a run, and their padding mask.

    Attributes:
        tokens: By row and position.
        mask: 1 for real tokens, or None where nothing is padded.
    """

    tokens: Rows
    mask: Rows | None = None

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Returns a batch as data."""
        return cls(_rows(batch.ids), None if batch.mask is None else _rows(batch.mask))

    def batch(self) -> Batch:
        """Returns the batch of the data."""
        return Batch(torch.tensor(self.tokens), None if self.mask is None else torch.tensor(self.mask))


@dataclass(frozen=True)
class Experiment:
    """A sweep as data. All that is random in it has its seed in the intervention that draws.

    Attributes:
        model: The model that it was made for.
        input: The run that is changed.
        sources: The runs from which values are taken, by name.
        grid: The cells.
        background: Interventions that are made in every cell.
        metrics: By name.
        versions: Of the libraries that it was made with.
    """

    model: ModelIdentity
    input: Inputs
    sources: Mapping[str, Inputs]
    grid: Grid
    background: tuple[Intervention, ...]
    metrics: Mapping[str, LogitMetric]
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """Returns the experiment as JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                "model": asdict(self.model),
                "input": asdict(self.input),
                "sources": {name: asdict(source) for name, source in self.sources.items()},
                "grid": self.grid.to_json(),
                "background": [one.to_json() for one in self.background],
                "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
                "versions": dict(self.versions),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns the experiment of its JSON.

        Raises:
            InvalidArgumentError: It is none.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError):
            data = None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidArgumentError("this is no experiment", expected=f"JSON of the format {FORMAT!r}")
        try:
            return cls(
                ModelIdentity(**data["model"]),
                _inputs(data["input"]),
                {name: _inputs(source) for name, source in data["sources"].items()},
                Grid.from_json(data["grid"]),
                tuple(Intervention.from_json(one) for one in data["background"]),
                {name: parse_metric(metric) for name, metric in data["metrics"].items()},
                dict(data["versions"]),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidArgumentError("this experiment is damaged", reason=reason) from error

    def save(self, path: str | Path) -> None:
        """Writes the experiment to a JSON file."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Returns the experiment of a file that `save` wrote."""
        return cls.from_json(path_of(path).read_text())

    def check_model(self, bridge: TransformerBridge) -> None:
        """Raises unless a model is the one that the experiment was made for.

        Raises:
            InvalidArgumentError: Its weights, dtype or architecture are others.
        """
        check_bridge(bridge)
        found = ModelIdentity.of(bridge)
        own = (self.model.architecture, self.model.dtype, self.model.fingerprint)
        if (found.architecture, found.dtype, found.fingerprint) != own:
            raise InvalidArgumentError(
                "the experiment was made for another model",
                expected=_described(self.model),
                got=_described(found),
            )


def versions() -> dict[str, str]:
    """Returns the versions of the libraries on which figures depend."""
    return {name: version(name) for name in ("clearspan", "torch", "transformers")}


def _described(model: ModelIdentity) -> str:
    revision = "" if model.revision is None else f", revision {model.revision}"
    return f"{model.name} ({model.architecture}{revision}), {model.dtype}, weights {model.fingerprint[:12]}"


def _inputs(data: Mapping[str, Any]) -> Inputs:
    mask = data["mask"]
    return Inputs(tuple(map(tuple, data["tokens"])), None if mask is None else tuple(map(tuple, mask)))


def _rows(tensor: Tensor) -> Rows:
    return tuple(map(tuple, tensor.tolist()))


@no_grad
def fingerprint(model: torch.nn.Module) -> str:
    """Returns a digest of all parameters and stored buffers: names, dtypes, shapes and every value.

    With adapters, it is also of which are on, active and merged.

    It is computed anew each time, from the bytes: weights can change without a trace in torch's counters. Weights that
    are not in memory (on the meta device) count by name and shape alone.
    """
    digest, first_names = hashlib.blake2b(digest_size=32), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        first = first_names.setdefault(id(tensor), name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {first}".encode())
        if first == name:  # a tied weight is read once
            for part in _bytes_of(tensor.detach()):
                digest.update(part)
    for setting in settings(model):
        digest.update(repr(setting).encode())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes, some at a time; those of its parts where it has several, as quantised ones have."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _bytes_of(getattr(tensor, part))
    elif not tensor.is_meta:
        for part in tensor.reshape(-1).split(_AT_ONCE):
            yield part.cpu().contiguous().view(torch.uint8).numpy().data
