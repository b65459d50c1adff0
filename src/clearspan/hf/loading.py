"""Loading: a hub id, a local folder, or the embedded model."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from clearspan.architectures import adapter_class
from clearspan.errors import CheckpointNotFoundError, CompiledModelError, InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = ("tiny-bigcode",)
"""Models that are part of the package."""


def load_model(
    name: str | Path, dtype: torch.dtype | Literal["auto"], **from_pretrained_kwargs: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """Returns a model in eval mode and its tokenizer, None where the checkpoint has none.

    Raises:
        CheckpointNotFoundError: The folder is no checkpoint, or the name is none that can be fetched.
        UnsupportedArchitectureError: The architecture has no adapter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(files("clearspan") / "models" / str(name)) if name in EMBEDDED else str(name)
    _check_folder(source)
    hub = {key: value for key, value in from_pretrained_kwargs.items() if key in _HUB_KEYWORDS}
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(
            f"cannot load {str(name)!r}",
            expected=f"a hub id, a checkpoint's folder, or one of the embedded models: {', '.join(EMBEDDED)}",
            reason=str(error).splitlines()[0],
        ) from error
    for architecture in config.architectures or ():
        adapter_class(architecture)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **from_pretrained_kwargs)
    model.config.name_or_path = str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except (OSError, ValueError):  # a checkpoint without tokenizer files
        tokenizer = None
    return model.eval(), tokenizer


_HUB_KEYWORDS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "trust_remote_code",
    "subfolder",
    "force_download",
)


def _check_folder(source: str) -> None:
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(
            f"{source!r} is a folder, but not a checkpoint",
            expected="config.json, weights, and tokenizer files, as save_pretrained writes them",
            got=", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "an empty folder",
        )


def check_model(model: object) -> None:
    """Raises unless the object is a Hugging Face model that can be listened to."""
    from transformers import PreTrainedModel

    original = getattr(model, "_orig_mod", None)
    if original is not None:
        raise CompiledModelError(
            "this is the result of torch.compile, and compiled code drops torch hooks quietly",
            where=f"{type(model).__name__} of {type(original).__name__}",
            fix="clearspan.boot(compiled._orig_mod)",
        )
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgumentError(
            "cannot boot this object",
            expected="a hub id, a folder, the name of an embedded model, or a loaded PreTrainedModel",
            got=type(model).__name__,
        )
