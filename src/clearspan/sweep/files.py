"""Sweeps as files: the experiment, and what was found so far."""

from pathlib import Path
from typing import TYPE_CHECKING

from clearspan.sweep.experiment import Experiment
from clearspan.sweep.findings import Findings
from clearspan.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from clearspan.sweep.sweep import Sweep

FORMAT = "clearspan sweep 1"


def save(sweep: "Sweep", path: str | Path) -> None:
    """Writes a sweep to one safetensors file."""
    write_tensors(path, FORMAT, sweep.findings.tensors(), {"experiment": sweep.experiment().to_json()})


def load(path: str | Path) -> tuple[Experiment, Findings]:
    """Returns the experiment of a file that `save` wrote, and what was found.

    Raises:
        InvalidArgumentError: The file is no sweep.
    """
    tensors, metadata = read_tensors(path, FORMAT, what="sweep", written_by="Sweep.save")
    return Experiment.from_json(metadata["experiment"]), Findings.of_tensors(tensors)
