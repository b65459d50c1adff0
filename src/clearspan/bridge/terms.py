"""The terms on which a run's values are kept: which positions, and where."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clearspan.bridge.positions import PosSlice, position_index
from clearspan.hf.recording import Recording
from clearspan.hf.relocation import Copies, Relocation


@dataclass(frozen=True, eq=False)
class Terms:
    """How the values of one run are kept.

    Attributes:
        rows: Rows of the input.
        positions: Positions of the input.
        index: The positions to keep, or None for all.
        is_one: Whether one position is kept, whose axis goes.
        device: Where they are kept, or None for where they are made.
        may_defer: Whether the inside of attention may be computed later.
    """

    rows: int
    positions: int
    index: slice | Tensor | None
    is_one: bool
    device: torch.device | None
    may_defer: bool

    @classmethod
    def of(
        cls, shape: tuple[int, int], pos_slice: PosSlice, device: torch.device | str | None, *, may_defer: bool = True
    ) -> Self:
        """Returns the terms for an input's rows and positions.

        Raises:
            InvalidArgumentError: `pos_slice` names no position of the run.
        """
        rows, positions = shape
        index = position_index(pos_slice, positions)
        where = None if device is None else torch.device(device)
        return cls(rows, positions, index, isinstance(pos_slice, int), where, may_defer and index is None)

    @property
    def kept_positions(self) -> int:
        """How many positions are kept."""
        match self.index:
            case None:
                return self.positions
            case slice():
                return len(range(*self.index.indices(self.positions)))
        return len(self.index)

    def recording(self, copies: Copies) -> Recording:
        """Returns a recording that keeps on these terms.

        Args:
            copies: Those made in the run by picking positions and by moving; what shared a storage shares one again.
        """
        relocation = None if self.device is None else Relocation(self.device, copies)

        def keep(tensor: Tensor, pos_dim: int) -> Tensor:
            if self.index is not None:
                tensor = copies.of(tensor, lambda whole: self._picked(whole, pos_dim, relocation), pos_dim)
            return tensor if relocation is None else relocation(tensor)

        has_transform = self.index is not None or relocation is not None
        return Recording(self.rows, keep if has_transform else None, self.may_defer, relocation)

    def _picked(self, tensor: Tensor, pos_dim: int, relocation: Relocation | None) -> Tensor:
        if isinstance(self.index, slice):
            picked = tensor[(slice(None),) * pos_dim + (self.index,)].clone()
        else:
            assert self.index is not None, "it is asked only where positions are picked"
            picked = tensor.index_select(pos_dim, self.index.to(tensor.device))
        return picked if relocation is None else relocation(picked)
