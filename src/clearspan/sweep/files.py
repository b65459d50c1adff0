"""Sweeps as files: the experiment, and what was found so far."""

from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
from safetensors.torch import save_file

from clearspan.errors import InvalidArgumentError
from clearspan.sweep.experiment import Experiment
from clearspan.sweep.findings import Findings

if TYPE_CHECKING:
    from clearspan.sweep.sweep import Sweep

FORMAT = "clearspan sweep 1"


def save(sweep: "Sweep", path: str | Path) -> None:
    """Writes a sweep to one safetensors file."""
    metadata = {"format": FORMAT, "experiment": sweep.experiment().to_json()}
    save_file(sweep.findings.tensors(), path, metadata)


def load(path: str | Path) -> tuple[Experiment, Findings]:
    """Returns the experiment of a file that `save` wrote, and what was found.

    Raises:
        InvalidArgumentError: The file is no sweep.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise InvalidArgumentError(
                f"{Path(path).name} is no sweep", expected=f"a file written by Sweep.save, of format {FORMAT!r}"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Experiment.from_json(metadata["experiment"]), Findings.of_tensors(tensors)
