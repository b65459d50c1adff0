"""Loading: a hub id, a local folder, or the embedded model; and the sizes that a model's config gives."""

import pickle
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from clearspan.architectures import ArchitectureAdapter, adapter_class
from clearspan.architectures.decoder import SIZES
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import (
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
    name: str | Path, dtype: torch.dtype | Literal["auto"], **from_pretrained_kwargs: Any
) -> "tuple[PreTrainedModel, OwnTokenizer]":
    """Returns a model in eval mode and its tokenizer, or why it has none.

    A checkpoint's own code runs only with `trust_remote_code=True`; without it transformers would ask on the terminal.

    Raises:
        CheckpointNotFoundError: The folder is no checkpoint, or nothing of this name can be fetched.
        CheckpointError: Weights are missing, damaged, or of other sizes.
        UnsupportedArchitectureError: The architecture has no adapter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = str(files("clearspan") / "models" / str(name)) if name in EMBEDDED else str(name)
    if is_adapter_folder(source):
        return _adapted_model(source, dtype, **from_pretrained_kwargs)
    _check_folder(source)
    keywords = {"trust_remote_code": False, **from_pretrained_kwargs}
    hub = {key: value for key, value in keywords.items() if key in _HUB_KEYWORDS}
    try:
        config = AutoConfig.from_pretrained(source, **hub)
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
    for architecture in config.architectures or ():
        adapter_class(architecture)
    model = _weighted(AutoModelForCausalLM, name, source, dtype=dtype, **keywords)
    model.config.name_or_path = str(name)
    return model.eval(), load_tokenizer(source, **hub)


def _config_by_class(source: str, hub: dict[str, Any]) -> "PretrainedConfig | None":
    """Returns the config of a checkpoint that names its class and no model type, as the first releases wrote it.

    Returns None where transformers does not load causal language models of that class.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    entries, _ = transformers.PretrainedConfig.get_config_dict(source, **hub)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    name = next((name for name in entries.get("architectures") or () if name in known), None)
    return None if name is None else getattr(transformers, name).config_class.from_dict(entries)


def _adapted_model(
    folder: str, dtype: torch.dtype | Literal["auto"], **from_pretrained_kwargs: Any
) -> "tuple[PreTrainedModel, OwnTokenizer]":
    """Returns the base model of an adapter's folder with the adapter in it, and the folder's or base's tokenizer."""
    base = base_of(folder)
    try:
        model, tokenizer = load_model(base, dtype, **from_pretrained_kwargs)
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


def bridge_config(model: "PreTrainedModel", adapter: type[ArchitectureAdapter]) -> TransformerBridgeConfig:
    """Returns the sizes of a model.

    Args:
        model: The Hugging Face model.
        adapter: Its adapter's class, which says which entries of the config the model's code reads.
    """
    config: PretrainedConfig = model.config
    found = {field: _first(config, *names) for field, names in {**SIZES, **adapter.sizes}.items()}
    eps = _first(config, str(adapter.config_values.get("eps_attr")))
    return TransformerBridgeConfig(
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_layers=config.num_hidden_layers,
        n_ctx=found["n_ctx"] or UNLIMITED,
        d_vocab=config.vocab_size,
        d_head=found["d_head"] or 0,
        d_mlp=found["d_mlp"] or 0,
        act_fn=found["act_fn"] or "",
        eps=1e-5 if eps is None else eps,
        n_key_value_heads=found["n_key_value_heads"],
        architecture=type(model).__name__,
        model_name=config.name_or_path or "",
        dtype=model.dtype,
        hf=_entries(config),
    )


def current(cfg: TransformerBridgeConfig, model: "PreTrainedModel") -> TransformerBridgeConfig:
    """Returns the sizes of a model, with those that can have changed brought up to date."""
    size = model.config.vocab_size
    if size != cfg.d_vocab:
        cfg.d_vocab, cfg.hf = size, {**cfg.hf, "vocab_size": size}
    cfg.dtype = model.dtype
    return cfg


def _entries(config: "PretrainedConfig") -> dict[str, Any]:
    """Returns the config's entries under their own names and under the common ones."""
    own = config.to_dict()
    return {**own, **{common: own[name] for common, name in config.attribute_map.items() if name in own}}


def _first(config: "PretrainedConfig", *names: str) -> Any:
    """Returns the first of these entries that the config has, under its own or a common name."""
    for name in names:
        stored = config.attribute_map.get(name, name)
        value = vars(config).get(stored)
        if value is not None:
            return value
    return None


def revision_of(model: "PreTrainedModel") -> str | None:
    """Returns the commit of a model's files on the hub, or None where they come from elsewhere."""
    return vars(model.config).get("_commit_hash")
