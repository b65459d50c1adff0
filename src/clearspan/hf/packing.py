"""Tensors packed for writing: what is one storage is written once, and is one again when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """How a tensor lies in one that is written.

    Attributes:
        of: The name under which that is written.
        shape: Sizes of the tensor's axes.
        stride: Its steps from place to place on each axis, in elements.
        offset: Where in what is written it starts, in elements.
    """

    of: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def seen(self, written: Tensor) -> Tensor:
        """Returns the tensor as a view of what was written."""
        return written.reshape(-1).as_strided(self.shape, self.stride, self.offset)


def packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, View]]:
    """Returns dense tensors to be written, and how each of some tensors lies in them.

    Tensors that share a storage lie in one, which has the name of the first of them: of the first that holds all the
    others as it is, where there is one. Else it is flat, and of no more of the storage than they reach.

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
