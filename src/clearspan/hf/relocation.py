"""Relocation: what one forward makes, brought to another device as it appears, and nothing of it twice."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Copies:
    """The copies made of one forward's tensors, so that each is made once. It keeps alive the copies alone.

    A tensor is known by its place in its storage, and by how often that was written.

    Args:
        is_alone: Whether nobody writes into the tensors beside the model. Tensors made under `torch.inference_mode` do
            not count writes, and are copied each time where somebody may.
    """

    def __init__(self, is_alone: bool = True) -> None:
        self._is_alone = is_alone
        self._made: dict[tuple[object, ...], tuple[StorageWeakRef, Tensor]] = {}

    def of(self, tensor: Tensor, make: Callable[[Tensor], Tensor], *detail: object) -> Tensor:
        """Returns the copy of a tensor, made now or before.

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
    """Brings tensors to a device. What shared a storage shares one there; a tensor that is there stays as it is.

    Args:
        device: Where to.
        copies: Those made so far.
    """

    def __init__(self, device: torch.device | str, copies: Copies | None = None) -> None:
        self.device = torch.device(device)
        self._copies = Copies() if copies is None else copies

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
        return tensor.to(self.device)


def _fills(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor shows every number of its storage."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count >= whole.numel()
