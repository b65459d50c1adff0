"""Adapters of peft on a model's modules: which module acts in a place, which adapters are on, and how they are set.

Nothing here imports peft: its classes are known by name.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import Tensor, nn

Kind = Literal["tuner", "parameters", "norm", "copies", "tokens"]
_KINDS: dict[str, Kind] = {
    "ParamWrapper": "parameters",
    "LNTuningLayer": "norm",
    "ModulesToSaveWrapper": "copies",
    "TrainableTokensWrapper": "tokens",
    "BaseTunerLayer": "tuner",
}
"""By class: a tuner adds to a layer or scales it, one of parameters to a parameter by name; others stand in for it."""


@functools.cache
def kind_of(module_type: type[nn.Module]) -> Kind | None:
    """Returns the kind of a module of peft; None for any other module."""
    names = [base.__name__ for base in module_type.__mro__ if base.__module__.partition(".")[0] == "peft"]
    return next((kind for name, kind in _KINDS.items() if name in names), None) if names else None


def acting(module: nn.Module) -> nn.Module:
    """Returns the module whose parameters are used where an adapter is: its copy of the module, or the base layer."""
    while (kind := kind_of(type(module))) is not None:
        module = _inner(module, kind)
    return module


def _inner(module: Any, kind: Kind) -> nn.Module:
    """Returns the module that acts in the place of one of peft, or that it adapts."""
    if kind == "tokens":
        return module._modules["token_adapter"]
    if kind == "copies":
        names = module.active_adapters
        is_off = module.disable_adapters or not names or any(name not in module._adapters for name in names)
        return module._modules["original_module"] if is_off else module._modules["modules_to_save"][names[0]]
    if kind == "norm" and not (module.disable_adapters or module.merged) and module.active_adapters:
        return module._modules["ln_tuning_layers"][module.active_adapters[0]]
    return module._modules["base_layer"]


def tuners(module: nn.Module) -> Iterator[tuple[Any, Kind]]:
    """Yields the tuners between a module and the parameters that it uses, outer ones first."""
    while (kind := kind_of(type(module))) is not None:
        if kind in ("tuner", "parameters"):
            yield module, kind
        module = _inner(module, kind)


def active(tuner: Any) -> list[str]:
    """Returns the names of the adapters that add to a tuner's base layer now."""
    if tuner.disable_adapters or tuner.merged:
        return []
    here = {name for names in tuner.adapter_layer_names for name in getattr(tuner, names)}
    return [name for name in tuner.active_adapters if name in here]


def active_adapters(module: nn.Module) -> list[str]:
    """Returns the names of the adapters whose part is in a module's weights, but not in one parameter."""
    return list(dict.fromkeys(name for tuner, _ in tuners(module) for name in active(tuner)))


@dataclass(frozen=True)
class Adapted:
    """What the weights of a module with adapters are made of, at one moment.

    Attributes:
        module: The module of peft.
        tensors: All its parameters and buffers.
        version: Torch's count of edits of each, and how its adapters are set.
    """

    module: nn.Module
    tensors: tuple[Tensor, ...]
    version: tuple[object, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Returns what a module's weights are made of now."""
        tensors = (*module.parameters(), *module.buffers())
        edits = tuple((id(one), None if one.is_inference() else one._version) for one in tensors)
        return cls(module, tensors, (edits, *settings(module)))


def sources(module: nn.Module) -> "list[Tensor] | list[Adapted]":
    """Returns what a module's weights are made of: its parameters, or one record of what an adapter is on."""
    if kind_of(type(module)) is None:
        return [parameter for parameter in module._parameters.values() if parameter is not None]
    return [Adapted.of(module)]


def settings(module: nn.Module) -> Iterator[tuple[object, ...]]:
    """Yields how each module of peft in a module is set: off, active and merged adapters, and how they are scaled."""
    for part in module.modules():
        if kind_of(type(part)) is not None:
            peft: Any = part
            scaling = tuple((name, repr(scale)) for name, scale in dict(vars(part).get("scaling", {})).items())
            yield peft.disable_adapters, tuple(peft.active_adapters), tuple(peft.merged_adapters), scaling
