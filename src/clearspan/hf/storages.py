"""Storages: tensors that share one share one again when they are moved to another device, or written to a file."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from clearspan.transfers import Outbound

_VERSION_OF_NEW = 1
"""What torch counts for a tensor that was given its storage by `set_`."""


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Returns the storages of some tensors, each once, with their bytes."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


class Copies:
    """The copies made of one forward's tensors, each made once. Only the copies are kept alive.

    A tensor is identified by its place in its storage, and by how often that storage was written.

    Args:
        is_alone: Whether only the model writes into the tensors. Tensors made under `torch.inference_mode` do not count
            writes; where others may write too, these are copied each time.
    """

    def __init__(self, is_alone: bool = True) -> None:
        self._is_alone = is_alone
        self._made: dict[tuple[object, ...], tuple[StorageWeakRef, Tensor]] = {}

    def of(self, tensor: Tensor, make: Callable[[Tensor], Tensor], *detail: object) -> Tensor:
        """Returns the copy of a tensor: the one made before, or a new one.

        Args:
            tensor: The tensor.
            make: Makes a copy.
            detail: What else a copy depends on.
        """
        key = self._key(tensor, *detail)
        if key is None:
            return make(tensor)
        if key not in self._made:
            # The weak reference keeps the address from being given to another storage.
            self._made[key] = (StorageWeakRef(tensor.untyped_storage()), make(tensor))
        return self._made[key][1]

    def has(self, tensor: Tensor, *detail: object) -> bool:
        """Whether a copy of the tensor was made."""
        return self._key(tensor, *detail) in self._made

    def _key(self, tensor: Tensor, *detail: object) -> tuple[object, ...] | None:
        if tensor.is_inference() and not self._is_alone:
            return None
        writes = 0 if tensor.is_inference() else tensor._version
        at = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        return (*at, tensor.dtype, writes, *detail)


class Relocation:
    """Brings tensors to a device. Tensors that shared a storage share one there; what is there already stays.

    Args:
        device: The device; None copies every tensor where it is.
        copies: Copies made so far.
        outbound: Makes the copies on the CPU, which are complete when its context closes; None has each of them
            complete when it is returned.
    """

    def __init__(
        self, device: torch.device | str | None, copies: Copies | None = None, outbound: Outbound | None = None
    ) -> None:
        self.device = None if device is None else torch.device(device)
        self._copies = Copies() if copies is None else copies
        self._outbound = outbound

    def __call__(self, tensor: Tensor) -> Tensor:
        """Returns the tensor on the device."""
        if tensor.device == self.device:
            return tensor
        whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        if not (_fills(tensor, whole) or self._copies.has(whole)):
            return self._copies.of(tensor, self._bring)
        there = self._copies.of(whole, self._bring)
        return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _bring(self, tensor: Tensor) -> Tensor:
        if self.device is None:
            return tensor.clone()
        if self._outbound is not None and self.device.type == "cpu":
            return self._outbound.copy(tensor)
        return tensor.to(self.device)


def _fills(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor shows every number of its storage."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count >= whole.numel()


class CountedViews:
    """Views that count edits, of tensors that do not: those made under `torch.inference_mode`.

    All views of one storage share one count, and keep the storage.
    """

    def __init__(self) -> None:
        self._bytes: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Returns a view of all of a tensor that counts edits; the tensor itself if it does, or has no values."""
        if not tensor.is_inference() or tensor.is_meta:
            return tensor
        storage = tensor.untyped_storage()
        with torch.inference_mode(False), torch.no_grad():
            if storage._cdata not in self._bytes:
                empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                self._bytes[storage._cdata] = empty.set_(storage, 0, (storage.nbytes(),), (1,))
            elements = self._bytes[storage._cdata].view(tensor.dtype)
            return elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def was_written(self, tensor: Tensor) -> bool:
        """Whether anyone wrote into the storage of such a tensor through one of the views."""
        written = self._bytes.get(tensor.untyped_storage()._cdata)
        return written is not None and written._version > _VERSION_OF_NEW


@dataclass(frozen=True)
class View:
    """How a tensor lies in a tensor that is written to a file.

    Attributes:
        of: Name of the tensor that is written.
        shape: Sizes of the axes.
        stride: Strides of the axes, in elements.
        offset: First element in the written tensor.
    """

    of: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def seen(self, written: Tensor) -> Tensor:
        """Returns the tensor as a view of the written one."""
        return written.reshape(-1).as_strided(self.shape, self.stride, self.offset)


def packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, View]]:
    """Returns the dense tensors to write to a file, and how each of the given tensors lies in them.

    Tensors that share a storage are written as one: as the first of them that covers all the others, under its name; or
    else flat, under the name of the first, and no further than they reach.

    Args:
        tensors: The tensors by name.
    """
    sharing: dict[tuple[int, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault((tensor.untyped_storage()._cdata, tensor.dtype), {})[name] = tensor
    written: dict[str, Tensor] = {}
    views: dict[str, View] = {}
    seen: set[int] = set()
    for (storage, _), named in sharing.items():
        start = min(int(tensor.storage_offset()) for tensor in named.values())
        end = max(map(_end, named.values()))
        first, any_tensor = next(iter(named.items()))
        home, dense = first, any_tensor.as_strided((end - start,), (1,), start)
        for name, tensor in named.items():
            if tensor.is_contiguous() and tensor.numel() == end - start:
                home, dense = name, tensor
                break
        written[home] = dense.clone() if storage in seen else dense  # the same numbers in another dtype
        seen.add(storage)
        for name, tensor in named.items():
            views[name] = View(home, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - start)
    return written, views


def _end(tensor: Tensor) -> int:
    """Returns how far into its storage a tensor reaches, in elements."""
    start = int(tensor.storage_offset())
    if not tensor.numel():
        return start
    return start + 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
