"""Offloaded modules: accelerate holds their weights elsewhere and brings them in while they run."""

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module runs: where its weight is, or where accelerate brings it."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook = vars(module).get("_hf_hook")
    return device if hook is None else torch.device(hook.execution_device)
