"""Tiny random models, one of each model type that transformers maps to a causal language model."""

import dataclasses
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from clearspan.errors import InvalidArgumentError, UnbuildableError
from clearspan.hf.drawn import draw, quiet
from clearspan.points import nearest
from clearspan.zoo.recipes import COMMON, OWN, REQUIRED, UNBUILDABLE, Entries
from clearspan.zoo.stand_ins import stand_in_for, stand_ins

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_PARAMETERS = 2_000_000
"""Parameters of a model that counts as tiny."""


def types() -> tuple[str, ...]:
    """Returns the model types that the installed transformers maps to a causal language model.

    Example:
        >>> import clearspan
        >>> "gpt2" in clearspan.zoo.types()
        True
    """
    return tuple(_class_names())


def class_name(model_type: str) -> str:
    """Returns the name of the class that transformers loads a model type with.

    Raises:
        InvalidArgumentError: transformers has no such model type.
    """
    names = _class_names()
    if model_type not in names:
        raise InvalidArgumentError(
            f"unknown model type {model_type!r}",
            expected="a model type that transformers maps to a causal language model: clearspan.zoo.types()",
            nearest=nearest(model_type, names),
        )
    return names[model_type]


def build(model_type: str, *, seed: int = 0) -> "PreTrainedModel":
    """Returns a tiny random model of a model type, on the CPU, in float32 and in eval mode.

    It has at least one layer of each kind that its config can have. Weights, biases, norms and what a checkpoint keeps
    in buffers are all drawn, and large enough that every path matters. Nothing is downloaded.

    Args:
        model_type: One of `types()`.
        seed: What weights are drawn from. The same seed gives the same model.

    Returns:
        A Hugging Face model of the class that `AutoModelForCausalLM` would load.

    Raises:
        InvalidArgumentError: transformers has no such model type.
        UnbuildableError: No tiny model of this type can be built; `reason` says why.

    Example:
        >>> import clearspan
        >>> clearspan.zoo.build("llama").config.num_hidden_layers
        2
    """
    name = class_name(model_type)
    why = why_unbuildable(model_type)
    if why is not None:
        raise UnbuildableError(f"no tiny {model_type} can be built", reason=why)
    with quiet(), stand_ins(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = _untrained(model_type, name)
    draw(model, torch.Generator().manual_seed(seed))
    return model.eval()


def why_unbuildable(model_type: str) -> str | None:
    """Returns why no tiny model of a type can be built here, or None where one can."""
    missing = [package for package in REQUIRED.get(model_type, ()) if find_spec(package) is None]
    if missing:
        return f"it needs packages that are not installed: {', '.join(missing)}"
    return UNBUILDABLE.get(model_type)


def _class_names() -> dict[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _untrained(model_type: str, name: str) -> "PreTrainedModel":
    """Returns a model as its class makes it.

    Raises:
        UnbuildableError: It raises, or is large: its recipe does not fit.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_class: type[PreTrainedModel] = getattr(transformers, name)
    faults = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        config = _config(model_type, model_class)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size <= MOST_PARAMETERS:
            return model_class(_config(model_type, model_class))
    except (*faults, StrictDataclassError) as error:
        raise UnbuildableError(
            f"no tiny {model_type} can be built", reason=f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    raise UnbuildableError(
        f"no tiny {model_type} can be built",
        expected=f"at most {MOST_PARAMETERS:,} parameters",
        got=f"{size:,}",
        reason="its config has sizes of its own",
        fix="add them to the model type's recipe in clearspan/zoo/recipes.py",
    )


def _config(model_type: str, model_class: "type[PreTrainedModel]") -> "PretrainedConfig":
    """Returns the config for a model class: the model type's own, or that of the part that the class is."""
    from transformers import CONFIG_MAPPING

    whole, own = CONFIG_MAPPING[model_type], model_class.config_class
    return _filled(own if own in _parts(whole).values() else whole, {})


def _parts(config_class: Any) -> "dict[str, type[PretrainedConfig]]":
    """Returns the classes of the configs inside a config, by the entry's name."""
    return dict(config_class.sub_configs)


def _filled(config_class: Any, given: Entries) -> "PretrainedConfig":
    """Returns a config of a class: the common entries that it has fields for, its model type's own, and those given."""
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = {field.name for field in dataclasses.fields(config_class)}
    common = {name: value for name, value in COMMON.items() if name in fields}
    entries: dict[str, Any] = {**common, **OWN.get(config_class.model_type, {}), **given}
    for name, part_class in _parts(config_class).items():
        own = dict(entries.get(name) or {})
        part_type = own.pop("model_type", None)
        if part_class is not AutoConfig:
            entries[name] = _filled(stand_in_for(part_class), own)
        elif part_type is not None:
            entries[name] = _filled(CONFIG_MAPPING[part_type], own)
        # Otherwise no text passes through the part, and its default is as good.
    return config_class(**entries)
