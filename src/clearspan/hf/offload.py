"""Offloaded modules: accelerate holds their weights elsewhere and brings them in while they run."""

from collections.abc import Iterator

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module runs: where its weight is, or where accelerate brings it."""
    device = next(module.parameters()).device
    return device if device.type != "meta" else next(_brought_to(module), device)


def _brought_to(module: nn.Module) -> Iterator[torch.device]:
    """Yields where accelerate brings weights of a module; the hooks for that are on the parts that hold them."""
    for part in module.modules():
        hook = vars(part).get("_hf_hook")
        # A hook may be several in a row, and some only move inputs.
        for one in () if hook is None else vars(hook).get("hooks", (hook,)):
            where = vars(one).get("execution_device")
            if where is not None:
                yield torch.device(where)
