"""A stand-in for Gemma 3n's vision tower, which needs packages of its own, and through which no text passes."""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@functools.cache
def _classes() -> "tuple[type[PretrainedConfig], type[PreTrainedModel]]":
    from transformers import Gemma3nVisionConfig, PreTrainedModel

    class StandInConfig(Gemma3nVisionConfig):
        """The tower's config, without a tower."""

    class StandInTower(PreTrainedModel):
        """A tower of one linear map."""

        config_class = StandInConfig

        def __init__(self, config: StandInConfig) -> None:
            super().__init__(config)
            self.map = nn.Linear(config.hidden_size, config.hidden_size)
            self.post_init()

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            """Returns the map's output."""
            return self.map(pixel_values)

    return StandInConfig, StandInTower


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """While the context is open, transformers makes the stand-in's tower of its config."""
    from transformers import AutoModel

    config, tower = _classes()
    AutoModel.register(config, tower, exist_ok=True)
    try:
        yield
    finally:
        AutoModel._model_mapping._extra_content.pop(config)


def stand_in_for(config_class: type) -> "type[PretrainedConfig]":
    """Returns the stand-in's config class for that of the tower, and every other class itself."""
    from transformers import Gemma3nVisionConfig

    return _classes()[0] if config_class is Gemma3nVisionConfig else config_class
