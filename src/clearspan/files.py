"""Files: written whole or not at all; tensors as safetensors with a format, so that another kind of file is named."""

import contextlib
import os
import pickle
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clearspan.checks import path_of
from clearspan.errors import InvalidArgumentError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to, which takes a file's place at the end.

    A write that breaks off leaves the file as it was. So do tensors that were read from it, which may lie on the disk.

    Raises:
        InvalidArgumentError: There is no such folder, or the path is one.
    """
    path = path_of(path)
    if path.is_dir() or not path.parent.is_dir():
        what = f"{str(path)!r} is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise InvalidArgumentError(what, expected="a file in a folder that is there")
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes text to a file."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", newline="")


def write_tensors(path: str | Path, format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors to one file.

    Args:
        path: The file.
        format: What the file is, with a number that changes when the format does.
        tensors: By name.
        metadata: Further text by name.
    """
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as new:
        save_file(dense, new, {"format": format, **metadata})


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
        InvalidArgumentError: It is of another format, or damaged.
        FileNotFoundError: There is no such file.
    """
    path, expected = path_of(path), f"a file written by {written_by}, of format {format!r}"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                got = f"format {metadata.get('format')!r}"
                raise InvalidArgumentError(f"{path.name} is no {what}", expected=expected, got=got)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except safetensors.SafetensorError as error:
        raise InvalidArgumentError(f"{path.name} is no {what}", expected=expected, got=str(error)) from error
    return tensors, metadata


def read_published(path: str | Path, *, what: str) -> dict[Any, Any]:
    """Returns the dictionary of a file that another library wrote: safetensors, or torch's, on the CPU.

    Of torch's files, which are pickles, those alone are read that hold tensors and plain data: no code of a file runs.

    Args:
        path: The file.
        what: What it should hold, in words, such as `"tuned lens"`.

    Raises:
        InvalidArgumentError: It is neither, or holds something else.
        FileNotFoundError: There is no such file.
    """
    path = path_of(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InvalidArgumentError(
            f"{path.name} is no {what}",
            expected="a file of tensors: .safetensors, or torch's",
            got=str(error).partition("\n")[0][:200],
        ) from error
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"{path.name} is no {what}", expected="a dictionary", got=type(found).__name__)
    return found
