"""Calls of the attention function apart from the model: tensors, and settings that can be written as text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clearspan.hf.attention import AttentionCall

Setting = bool | int | float | str | None


@dataclass(frozen=True)
class StoredCall:
    """What scores and pattern are computed from.

    Attributes:
        tensors: `query`, `key`, `attention_mask` where there is one, and tensors among the keywords.
        settings: The other keywords.
        parameters: Keywords that are the module's own parameters, each with its name there.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Setting]
    parameters: Mapping[str, str]

    @classmethod
    def of(cls, call: AttentionCall) -> "StoredCall | None":
        """Returns a call as it can be stored, or None where something in it is neither a tensor nor a setting."""
        own = {id(parameter): name for name, parameter in call.module.named_parameters()}
        tensors, settings, parameters = {"query": call.query, "key": call.key}, {}, {}
        for name, value in {"attention_mask": call.mask, **call.kwargs}.items():
            match value:
                case nn.Parameter() if id(value) in own:
                    parameters[name] = own[id(value)]
                case Tensor():
                    tensors[name] = value
                case None | bool() | int() | float() | str():
                    settings[name] = value
                case _:
                    return None
        return cls(tensors, settings, parameters)

    def restored(self, module: nn.Module) -> AttentionCall:
        """Returns the call of a module. Its values, which nobody reads, are a part of its keys."""
        named: dict[str, Any] = {**self.tensors, **self.settings}
        named |= {name: module.get_parameter(own) for name, own in self.parameters.items()}
        query, key, mask = (named.pop(name) for name in ("query", "key", "attention_mask"))
        return AttentionCall(module, query, key, key[..., :1], mask, named)
