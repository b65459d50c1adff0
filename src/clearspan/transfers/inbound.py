"""Inbound tensors: what a device is given, without waiting for what it was given before."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.transfers.side_streams import WITH_STREAMS


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; one that comes from ordinary memory of the CPU is not waited for.

    `tensor.to(device)` waits until the device has done all that it was given.
    """
    # Ordinary memory is read before the call returns. Pinned memory is read later, and the caller may write into it.
    is_read_at_once = device.type in WITH_STREAMS and tensor.device.type == "cpu" and not tensor.is_pinned()
    return tensor.to(device, non_blocking=is_read_at_once)


def numbers_on(device: torch.device, numbers: Any) -> Int[Tensor, "..."]:
    """Returns whole numbers as a tensor on a device, which is not waited for: places to write at.

    `torch.tensor(numbers, device=device)`, and an index on the CPU into a tensor on the device, wait for it.

    Args:
        device: The device.
        numbers: A whole number, or sequences of them.
    """
    return on_device(torch.tensor(numbers), device)
