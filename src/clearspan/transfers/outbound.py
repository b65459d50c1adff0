"""Outbound tensors: copies on the CPU that belong to the caller, made beside the computation."""

from collections import deque
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from clearspan.transfers.host_memory import PINNED, HostMemory
from clearspan.transfers.side_streams import SIDE_STREAMS, WITH_STREAMS, Sent, SideStreams

IN_FLIGHT_BYTES = 2**28
"""Bytes of snapshots that wait on devices for their copies, at most: 256 MiB.

A program gives a device its work faster than that is done, and more activations than a bus can carry: without a bound,
a cache that goes to the CPU because it does not fit on the device would fill the device. A larger tensor is copied
without a snapshot, while the program waits.
"""


class Outbound:
    """Makes copies on the CPU; all of them are complete when the context closes.

    If the context is left by an exception, the copies have no meaning, and nothing is waited for.

    Args:
        memory: Where the copies go.
        streams: What sends them.
        kinds: Kinds of device whose tensors are sent beside the computation; tensors of others are copied at once.
        in_flight: Bytes of snapshots on devices, at most.
    """

    def __init__(
        self,
        memory: HostMemory = PINNED,
        streams: SideStreams = SIDE_STREAMS,
        kinds: Collection[str] = WITH_STREAMS,
        in_flight: int = IN_FLIGHT_BYTES,
    ) -> None:
        self._memory = memory
        self._streams = streams
        self._kinds = kinds
        self._most = in_flight
        self._bytes = 0
        self._sent: deque[Sent] = deque()
        self._is_open = False

    def copy(self, tensor: Tensor) -> Tensor:
        """Returns a tensor's copy on the CPU, which is complete when the context closes.

        Outside of the context it is complete at once, and so is one that is to be on the tensor's graph. A tensor that
        is on the CPU is returned as it is.
        """
        is_on_graph = tensor.requires_grad and torch.is_grad_enabled()
        if not self._is_open or is_on_graph or tensor.device.type not in self._kinds:
            return tensor.to("cpu")
        target, source = self._memory.like(tensor), tensor.detach()
        if tensor.nbytes > self._most:  # the device may not have room for a snapshot
            if source.stride() != target.stride():
                return tensor.to("cpu")
            self._streams.send(source, target).wait()
            return target
        self._make_room(tensor.nbytes)
        self._sent.append(self._streams.send(source.clone(), target))
        self._bytes += tensor.nbytes
        return target

    def _make_room(self, size: int) -> None:
        """Drops snapshots whose copies have arrived, and waits for more of them where the bound requires it."""
        while self._sent and (self._bytes + size > self._most or self._sent[0].has_arrived):
            sent = self._sent.popleft()
            sent.wait()
            self._bytes -= sent.source.nbytes

    def __enter__(self) -> Self:
        self._is_open, self._bytes = True, 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_open = False
        try:
            for sent in self._sent if error is None else ():
                sent.wait()
        finally:
            self._sent.clear()


def on_cpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns tensors on the CPU; the CPU waits once, for all of them."""
    with Outbound() as outbound:
        return [outbound.copy(tensor) for tensor in tensors]
