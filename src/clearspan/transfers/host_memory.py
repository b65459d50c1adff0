"""Memory of the CPU for what leaves an accelerator: pinned up to a limit, then ordinary."""

import threading

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from clearspan.transfers.side_streams import WITH_STREAMS

PINNED_BYTES = 4 * 2**30
"""Bytes of pinned memory that copies may take together, by default: 4 GiB.

An accelerator fills pinned memory while it computes, but the system cannot use that memory for anything else.
"""

_MANY = 1024
"""Blocks after which those that were dropped are forgotten."""


class HostMemory:
    """Gives out memory of the CPU, and knows how much of the pinned memory it gave out is in use.

    Pinned memory comes from torch's caching host allocator, which rounds sizes up to powers of two; so they are counted
    here. A block is in use while any tensor in it is there. After that torch keeps it, and gives it out again for the
    same size. `torch.accelerator.empty_host_cache()` returns what torch keeps to the system.

    Args:
        limit: Bytes of pinned memory in use, at most.

    Attributes:
        limit: As given; it may be set. `clearspan.transfers.PINNED.limit = 2**30` limits all caches together, and 0
            puts every copy into ordinary memory.
    """

    def __init__(self, limit: int = PINNED_BYTES) -> None:
        self.limit = limit
        self._lent: list[tuple[StorageWeakRef, int]] = []
        self._bytes = 0
        self._looks_again_at = _MANY
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HostMemory(limit={self.limit})"

    def like(self, tensor: Tensor) -> Tensor:
        """Returns a tensor on the CPU of a tensor's shape, dtype and order of axes, without values.

        It is in pinned memory if the tensor is on an accelerator, and the limit allows it.
        """
        size = 1 << (tensor.nbytes - 1).bit_length()
        if not tensor.nbytes or not self._can_pin(tensor):
            return torch.empty_like(tensor, device="cpu")
        with self._lock:
            if not self._has_room(size):
                return torch.empty_like(tensor, device="cpu")
            found = self._pinned(tensor)
            self._lent.append((StorageWeakRef(found.untyped_storage()), size))
            self._bytes += size
            return found

    @property
    def in_use(self) -> int:
        """Bytes of pinned memory that were given out and are in use."""
        with self._lock:
            self._forget_dropped()
            return self._bytes

    def _has_room(self, size: int) -> bool:
        # Blocks that were dropped are looked for only where that can matter: a run may ask for hundreds.
        if self._bytes + size > self.limit or len(self._lent) >= self._looks_again_at:
            self._forget_dropped()
        return self._bytes + size <= self.limit

    def _forget_dropped(self) -> None:
        self._lent = [(block, size) for block, size in self._lent if not block.expired()]
        self._bytes = sum(size for _, size in self._lent)
        self._looks_again_at = 2 * len(self._lent) + _MANY

    def _can_pin(self, tensor: Tensor) -> bool:
        return tensor.device.type in WITH_STREAMS

    def _pinned(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)


PINNED = HostMemory()
"""The memory that all caches use. `PINNED.limit = 2**30` sets another limit."""
