"""Side streams: copies from accelerators that run beside the computation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WITH_STREAMS = ("cuda", "xpu")
"""Kinds of device that copy beside their computation. A tensor of any other device is copied at once."""


@dataclass(frozen=True, eq=False)
class Sent:
    """A copy on its way.

    Attributes:
        source: What is copied. It is kept, so that its memory is not given to another tensor meanwhile.
        event: Passes when the copy is complete.
    """

    source: Tensor
    event: Any

    @property
    def has_arrived(self) -> bool:
        """Whether the copy is complete; this does not wait."""
        return self.event.query()

    def wait(self) -> None:
        """Waits until the copy is complete."""
        self.event.synchronize()


class SideStreams:
    """A side stream for each device that tensors are sent from."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def send(self, source: Tensor, target: Tensor) -> Sent:
        """Has a side stream copy a tensor, and returns while the copy is on its way.

        Args:
            source: The tensor; nobody may write into it before the copy has arrived.
            target: A tensor of its shape and dtype on the CPU; until the copy has arrived its values have no meaning.
        """
        device = source.device
        module = torch.get_device_module(device)
        if device not in self._streams:
            self._streams[device] = module.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(module.current_stream(device))
        with module.stream(stream):
            target.copy_(source, non_blocking=True)
        event = module.Event()
        event.record(stream)
        return Sent(source, event)


SIDE_STREAMS = SideStreams()
"""Those of all transfers. torch has 32 streams for a device and gives them out in turn: a new one for each run would
now and then be the one that computes."""
