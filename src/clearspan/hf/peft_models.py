"""Models of peft: the base model in a `PeftModel`, and folders that hold an adapter alone."""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from clearspan.errors import CheckpointError, CheckpointNotFoundError, InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
_ROOTS = frozenset({"PeftModel", "PeftMixedModel"})
_KEEPS_FORWARD = frozenset({"BaseTuner", "AdaLoraModel"})
"""Tuners whose forward is the base model's; AdaLoRA's adds to the loss alone."""
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
_FORWARDS = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")


def base_model(model: object) -> object:
    """Returns the base model of a model of peft, with its adapters in place; any other object as it is.

    Raises:
        InvalidArgumentError: The adapter changes the model's forward, so that the base model alone is another model.
    """
    if not _ROOTS & {base.__name__ for base in type(model).__mro__}:
        return model
    peft: Any = model
    for config in peft.peft_config.values():
        _check_kind(config.peft_type, vars(config).get("alora_invocation_tokens"), type(model).__name__)
    tuner = peft._modules["base_model"]
    owner = next(base for base in type(tuner).__mro__ if "forward" in vars(base))
    if owner.__name__ not in _KEEPS_FORWARD:
        raise _changes_forward(owner.__name__, type(model).__name__, "it has a forward of its own")
    return tuner._modules["model"]


def _check_kind(kind: str, invocation: object, where: str) -> None:
    """Raises if a kind of adapter changes the forward of the model that it is in."""
    name = str(getattr(kind, "value", kind))
    if name in _PROMPTS:
        raise _changes_forward(name, where, "it gives the forward a learned prompt, which no weight of the model holds")
    if name in _FORWARDS:
        raise _changes_forward(name, where, "it has a forward of its own")
    if invocation:
        raise _changes_forward("aLoRA", where, "it acts from certain tokens on, which only its own forward looks for")


def _changes_forward(kind: str, where: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"an adapter of the kind {kind} cannot be booted",
        expected="adapters that change weights, such as LoRA",
        where=where,
        reason=reason,
        fix="clearspan.boot(base_model), which is the model without what the adapter does there",
    )


def is_adapter_folder(source: str) -> bool:
    """Whether a path is a folder that holds an adapter, not a model."""
    return (Path(source) / ADAPTER_CONFIG).is_file()


def base_of(folder: str) -> str:
    """Returns the name or folder of the base model that an adapter's folder names.

    Raises:
        CheckpointError: The folder's config cannot be read.
        CheckpointNotFoundError: It names none.
        InvalidArgumentError: The adapter changes the model's forward.
    """
    try:
        config = json.loads((Path(folder) / ADAPTER_CONFIG).read_text())
    except ValueError as error:
        raise CheckpointError(f"cannot read {ADAPTER_CONFIG} in {folder!r}", reason=str(error)) from error
    _check_kind(config.get("peft_type") or "", config.get("alora_invocation_tokens"), folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise CheckpointNotFoundError(
            f"{folder!r} is an adapter, and does not say of which model",
            expected=f"base_model_name_or_path in {ADAPTER_CONFIG}",
            fix="clearspan.boot(peft.PeftModel.from_pretrained(base_model, folder))",
        )
    return str(base)


def add_adapter(model: "PreTrainedModel", folder: str) -> None:
    """Puts the adapter of a folder into a model, as peft itself does: transformers' own loader loses parts of DoRA.

    Raises:
        CheckpointError: The adapter is of another model, or weights of it are missing or damaged; or peft is missing.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise CheckpointError(
            f"{folder!r} is an adapter, and loading one takes peft", reason=str(error), fix="pip install peft"
        ) from error
    try:
        config = peft.PeftConfig.from_pretrained(folder, local_files_only=True)
        config.inference_mode = True  # its parameters ask for no gradients, as in peft's own loading
        found = peft.PeftModel(model, config).load_adapter(folder, "default", local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise _not_for(model, folder, reason=_first_line(error)) from error
    wrong = sorted({*found.missing_keys, *found.unexpected_keys})
    if wrong:
        names = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise _not_for(model, folder, got=names, reason="only the model or only the file has these weights")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _not_for(model: "PreTrainedModel", folder: str, **facts: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter in {folder!r} cannot be put into its base model",
        expected=f"whole weights of an adapter of {type(model).__name__}, {model.config.name_or_path}",
        fix="clearspan.boot(peft.PeftModel.from_pretrained(base_model, folder)), with the model that it was made for",
        **facts,
    )
