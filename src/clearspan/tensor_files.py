"""Files of tensors: safetensors with a format in the metadata, so that a file of another kind is known by name."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from clearspan.errors import InvalidArgumentError, path_of


def write_tensors(path: str | Path, format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors to one file.

    Args:
        path: The file.
        format: What the file is, with a number that changes when the format does.
        tensors: By name.
        metadata: Further text by name.
    """
    path = path_of(path)
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(dense, path, {"format": format, **metadata})


def read_tensors(
    path: str | Path, format: str, *, what: str, written_by: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file that `write_tensors` wrote, on the CPU, and its metadata.

    Args:
        path: The file.
        format: What it must be.
        what: The same in words, such as `"tuned lens"`.
        written_by: What writes such files, such as `"TunedLens.save"`.

    Raises:
        InvalidArgumentError: It is of another format.
        FileNotFoundError: There is no such file.
    """
    path = path_of(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != format:
            raise InvalidArgumentError(
                f"{path.name} is no {what}",
                expected=f"a file written by {written_by}, of format {format!r}",
                got=f"format {metadata.get('format')!r}",
            )
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (it is no mapping)
