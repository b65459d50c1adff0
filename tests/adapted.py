"""Models of peft in tests: adapters with random weights on models of the zoo."""

import copy
from typing import Any

import peft
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.zoo import build

SPREAD = 0.1
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def all_linear(model: PreTrainedModel, **settings: Any) -> peft.LoraConfig:
    """Returns a config of LoRA on every linear map of the blocks, those of experts included."""
    names = [name for name, _ in model.named_parameters()]
    return peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        target_parameters=[part for part in EXPERTS if any(name.endswith(part) for name in names)] or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
        **settings,
    )


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Moves every trainable parameter by a random amount."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * SPREAD)


def adapted(variant: str, config: peft.PeftConfig | None = None, **changes: Any) -> peft.PeftModel:
    """Returns a model of the zoo with an adapter, by default LoRA on every linear map, in eval mode."""
    model = build(variant, **changes)
    made = peft.get_peft_model(model, config or all_linear(model))
    randomise(made)
    return made.eval()


def merged(model: peft.PeftModel, names: list[str] | None = None) -> PreTrainedModel:
    """Returns a plain model with the adapters' part in its weights, as peft computes it."""
    return copy.deepcopy(model).merge_and_unload(adapter_names=names)
