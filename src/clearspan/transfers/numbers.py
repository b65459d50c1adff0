"""Whole numbers that a device is given: rows, positions, columns."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from clearspan.transfers.side_streams import WITH_STREAMS


def numbers_on(device: torch.device, numbers: Any) -> Int[Tensor, "..."]:
    """Returns whole numbers as a tensor on a device, without waiting for what the device was given before.

    `torch.tensor(numbers, device=device)`, and an index on the CPU into a tensor on a device, wait for it.

    Args:
        device: The device.
        numbers: A whole number, or sequences of them.
    """
    # They lie in ordinary memory, which is read before the call returns.
    return torch.tensor(numbers).to(device, non_blocking=device.type in WITH_STREAMS)
