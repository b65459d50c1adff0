"""Loading: a hub id, a local folder, or the embedded model; and the sizes that a model's config gives."""

import pickle
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from clearspan.architectures import AdapterSource, adapter_class, name_of
from clearspan.architectures.adapter import FRAME_SIZES, SIZES, Size
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import (
    AdapterError,
    CheckpointError,
    CheckpointNotFoundError,
    CompiledModelError,
    InvalidArgumentError,
    UnknownArgumentError,
)
from clearspan.hf.peft_models import add_adapter, base_model, base_of, is_adapter_folder
from clearspan.hf.tokenizers import OwnTokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EMBEDDED = ("tiny-bigcode",)
"""Models that are part of the package."""
UNLIMITED = 2048
"""Context of a model whose config sets no limit."""


def load_model(
    name: str | Path,
    dtype: torch.dtype | Literal["auto"],
    adapter: AdapterSource | None = None,
    **from_pretrained_kwargs: Any,
) -> "tuple[PreTrainedModel, OwnTokenizer]":
    """Returns a model in eval mode and its tokenizer, or why it has none.

    A checkpoint's own code runs only with `trust_remote_code=True`; without it transformers would ask on the terminal.

    Args:
        name: A hub id, a folder, or an embedded model.
        dtype: Of the weights; `"auto"` is the checkpoint's own.
        adapter: The adapter that will serve it, or None for the registered one.
        **from_pretrained_kwargs: For `from_pretrained`.

    Raises:
        CheckpointNotFoundError: The folder is no checkpoint, or nothing of this name can be fetched.
        CheckpointError: Weights are missing, damaged, or of other sizes.
        UnsupportedArchitectureError: The architecture has no adapter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = str(files("clearspan") / "models" / str(name)) if name in EMBEDDED else str(name)
    if is_adapter_folder(source):
        return _adapted_model(source, dtype, adapter, **from_pretrained_kwargs)
    _check_folder(source)
    keywords = {"trust_remote_code": False, **from_pretrained_kwargs}
    hub = {key: value for key, value in keywords.items() if key in _HUB_KEYWORDS}
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except AttributeError as error:
        if "transformers_modules" not in str(error):
            raise
        raise _lacks_class(name, error) from error
    except (OSError, ValueError) as error:
        old = _config_by_class(source, hub) if "`model_type`" in str(error) else None
        if old is None:
            raise CheckpointNotFoundError(
                f"cannot load {str(name)!r}",
                expected=f"a hub id, a checkpoint's folder, or one of the embedded models: {', '.join(EMBEDDED)}",
                reason=str(error).splitlines()[0],
                fix=_TRUST if "trust_remote_code" in str(error) else None,
            ) from error
        config = keywords["config"] = old
    if adapter is None and not _is_causal(config):
        for architecture in config.architectures or ():
            adapter_class(architecture)
    model = _weighted(AutoModelForCausalLM, name, source, dtype=dtype, **keywords)
    model.config.name_or_path = str(name)
    return model.eval(), load_tokenizer(source, **hub)


def _is_causal(config: "PretrainedConfig") -> bool:
    """Whether a config's model is a causal language model, of transformers or with code of its own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "auto_map" in vars(config)


def _config_by_class(source: str, hub: dict[str, Any]) -> "PretrainedConfig | None":
    """Returns the config of a checkpoint that names its class and no model type, as the first releases wrote it.

    Returns None where transformers does not load causal language models of that class.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    entries, _ = transformers.PretrainedConfig.get_config_dict(source, **hub)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = entries.get("architectures") if isinstance(entries, dict) else None  # it is whatever the file holds
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    name = next((name for name in names if name in known), None)
    return None if name is None else getattr(transformers, name).config_class.from_dict(entries)


def _adapted_model(
    folder: str, dtype: torch.dtype | Literal["auto"], adapter: AdapterSource | None, **from_pretrained_kwargs: Any
) -> "tuple[PreTrainedModel, OwnTokenizer]":
    """Returns the base model of an adapter's folder with the adapter in it, and the folder's or base's tokenizer."""
    base = base_of(folder)
    try:
        model, tokenizer = load_model(base, dtype, adapter, **from_pretrained_kwargs)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"cannot load {base!r}, the base model of the adapter in {folder!r}",
            reason=error.message,
            fix="clearspan.boot(peft.PeftModel.from_pretrained(base_model, folder))",
        ) from error
    add_adapter(model, folder)
    has_own = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return model.eval(), load_tokenizer(folder) if has_own else tokenizer


def _weighted(auto_class: Any, name: str | Path, source: str, **keywords: Any) -> "PreTrainedModel":
    """Returns a checkpoint's model with all weights that its config asks for.

    Raises:
        CheckpointError: Weights are missing, damaged, or of other sizes.
        UnknownArgumentError: A keyword that nothing takes.
    """
    try:
        model, found = auto_class.from_pretrained(source, **keywords, output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UnknownArgumentError(
            f"unknown keyword {str(error).rpartition('argument ')[2]}", where="from_pretrained", reason=str(error)
        ) from error
    except AttributeError as error:
        if "transformers_modules" not in str(error):
            raise
        raise _lacks_class(name, error) from error
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"cannot load the weights of {str(name)!r}",
            expected="whole files of weights, of the sizes in config.json",
            reason=next(iter(str(error).splitlines()), type(error).__name__),
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"weights are missing from {str(name)!r}",
            got=", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            reason="transformers would draw them at random",
            fix="clearspan.boot(model), with a model that you loaded and gave its weights",
        )
    return model


def _lacks_class(name: str | Path, error: AttributeError) -> CheckpointError:
    """Returns the error of a checkpoint whose own code lacks a class."""
    return CheckpointError(
        f"the code of {str(name)!r} lacks a class",
        expected="the classes that auto_map in its config.json names, in its files of code",
        reason=str(error),
    )


_TRUST = "boot(..., trust_remote_code=True), once you have read its code"
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
            expected="config.json, weights, and tokenizer files, as save_pretrained writes them; or an adapter of peft",
            got=", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "an empty folder",
        )


def check_model(model: object) -> "PreTrainedModel":
    """Returns a Hugging Face model that can be listened to: the object, or the base model of a model of peft.

    Raises:
        CompiledModelError: It is compiled.
        InvalidArgumentError: It is no such model.
    """
    from transformers import PreTrainedModel

    model = base_model(model)
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
    return model


def bridge_config(model: "PreTrainedModel", source: AdapterSource) -> TransformerBridgeConfig:
    """Returns the sizes of a model.

    Args:
        model: The Hugging Face model.
        source: What makes its adapter, which says which entries of the config the model's code reads.

    Raises:
        AdapterError: The config does not say how wide the residual stream is, how many blocks or tokens there are.
    """
    config = text_config(model)
    sizes = {**FRAME_SIZES, **SIZES, **source.sizes}
    found = {field: _size(config, size) for field, size in sizes.items()}
    for field in ("d_model", "n_layers", "d_vocab"):
        if found[field] is None:
            raise AdapterError(
                f"the config of {type(model).__name__} has no {field}",
                expected=f"one of the entries {', '.join(names)}" if isinstance(names := sizes[field], tuple) else None,
                where=f"{name_of(source)}.sizes",
                fix=f"sizes = {{{field!r}: (entry,), ...}} in the adapter",
            )
    known = {field: value for field, value in found.items() if value is not None}
    eps = stored(config, sizes["eps"])
    return TransformerBridgeConfig(
        **{
            "n_heads": 0,  # no attention
            "n_ctx": UNLIMITED,
            "act_fn": "",
            **({"eps_attr": eps} if eps else {}),
            **known,
            "architecture": type(model).__name__,
            "model_name": model.config.name_or_path or "",
            "dtype": model.dtype,
            "hf": {**_entries(model.config), **_entries(config)},
        }
    )


def text_config(model: "PreTrainedModel") -> "PretrainedConfig":
    """Returns the config of a model's language model: of a model that sees or hears too, the part for text."""
    return model.config.get_text_config(decoder=True)


def current(cfg: TransformerBridgeConfig, model: "PreTrainedModel") -> TransformerBridgeConfig:
    """Returns the sizes of a model, with those that can have changed brought up to date."""
    size = _value(text_config(model), "vocab_size")
    if size is not None and size != cfg.hf.get("vocab_size"):  # it was resized since the sizes were read
        cfg.d_vocab, cfg.hf = size, {**cfg.hf, "vocab_size": size}
    cfg.dtype = model.dtype
    return cfg


def _entries(config: "PretrainedConfig") -> dict[str, Any]:
    """Returns the config's entries under their own names and under the common ones."""
    own = config.to_dict()
    return {**own, **{common: own[name] for common, name in config.attribute_map.items() if name in own}}


def _size(config: "PretrainedConfig", size: Size) -> Any:
    """Returns the first entry that is set; or the size itself, where a source gives that.

    Of an entry with a number for each layer it is the first layer's.
    """
    if not isinstance(size, tuple):
        return size
    name = stored(config, size)
    found = None if name is None else _value(config, name)
    return found[0] if isinstance(found, list) and found else found


def stored(config: "PretrainedConfig", names: Size) -> str | None:
    """Returns the first of these entries that the config has, under its own or a common name."""
    known = names if isinstance(names, tuple) else ()
    return next((name for name in known if _value(config, name) is not None), None)


def _value(config: "PretrainedConfig", name: str) -> Any:
    """Returns an entry, also one that a config of sizes in lists computes; None where there is none."""
    stored = config.attribute_map.get(name, name)
    computed = name in _COMPUTED and isinstance(vars(type(config)).get(stored), property)
    return getattr(config, stored) if computed else vars(config).get(stored)


_COMPUTED = frozenset(name for names in FRAME_SIZES.values() if isinstance(names, tuple) for name in names)
"""Entries that are taken from a config's properties too (LongCat counts its layers so)."""


def revision_of(model: "PreTrainedModel") -> str | None:
    """Returns the commit of a model's files on the hub, or None where they come from elsewhere."""
    return vars(model.config).get("_commit_hash")
