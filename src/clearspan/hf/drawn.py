"""Random weights, large enough that every path of a model matters."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

LEARNED = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Buffers that training changes: what is added to the scores by which experts are chosen."""


def draw(model: nn.Module, generator: torch.Generator) -> None:
    """Fills parameters, and the buffers that a checkpoint would fill."""
    with torch.no_grad():
        tables = {one.weight for one in model.modules() if isinstance(one, nn.Embedding)}
        for parameter in model.parameters():
            if parameter.requires_grad or parameter not in tables:  # tables of sines are frozen
                parameter.copy_(_normal(parameter, generator) * _spread(parameter))
        for path, buffer in model.named_buffers():
            match path.rpartition(".")[2]:
                case name if name in LEARNED:
                    buffer.copy_(_normal(buffer, generator) * 0.1)
                case "layer_scalar":
                    buffer.copy_(1 + _normal(buffer, generator) * 0.25)
                case "tid2eid":  # experts by token id
                    experts = len(model.get_parameter(f"{path.removesuffix('tid2eid')}weight"))
                    buffer.copy_(torch.rand(len(buffer), experts, generator=generator).argsort()[:, : buffer.shape[1]])


def _spread(parameter: Tensor) -> float:
    """Returns the standard deviation that a parameter is drawn with; of wide maps less, or attention sees one key."""
    return 0.5 if parameter.ndim < 2 else min(0.25, 2 / parameter.shape[-1] ** 0.5)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings off, and transformers from fetching kernels, while the context is open."""
    from transformers.integrations import hub_kernels
    from transformers.utils import logging

    verbosity, kernels = logging.get_verbosity(), hub_kernels._kernels_enabled
    logging.set_verbosity_error()
    hub_kernels._kernels_enabled = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub_kernels._kernels_enabled = kernels
        logging.set_verbosity(verbosity)
