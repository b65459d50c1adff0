"""The methods of a torch module that scripts call on a model, as methods of the bridge."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from clearspan.config import TransformerBridgeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModuleMethods:
    """Passes a few calls on to `hf_model`; what changes the model returns the bridge."""

    hf_model: "PreTrainedModel"
    cfg: TransformerBridgeConfig

    def to(self, where: torch.device | str | torch.dtype) -> Self:
        """Moves the model to a device, or changes its dtype, in place."""
        nn.Module.to(self.hf_model, where)
        self.cfg.dtype = self.hf_model.dtype
        return self

    def eval(self) -> Self:
        """Sets the model to evaluation: no dropout."""
        self.hf_model.eval()
        return self

    def train(self, mode: bool = True) -> Self:
        """Sets the model to training, or to evaluation with `mode=False`."""
        self.hf_model.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets whether gradients are computed for the model's parameters."""
        self.hf_model.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the parameters' gradients."""
        self.hf_model.zero_grad(set_to_none)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the model's parameters."""
        return self.hf_model.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the model's parameters with their Hugging Face names."""
        return self.hf_model.named_parameters()
