"""Memory for copies: pinned up to a limit of what is in use, then ordinary."""

import pytest
import torch

from clearspan.transfers import HostMemory


class Pins(HostMemory):
    """Pins as if there were an accelerator, and knows what it pinned."""

    def __init__(self, limit):
        super().__init__(limit)
        self.pinned = set()

    def _can_pin(self, tensor):
        return True

    def _pinned(self, tensor):
        found = torch.empty_like(tensor, device="cpu")
        self.pinned.add(found.data_ptr())
        return found

    def pins(self, count):
        found = self.like(torch.empty(count, dtype=torch.uint8))
        return found if found.data_ptr() in self.pinned else None


def test_a_limit_holds_for_what_is_in_use():
    memory = Pins(limit=256)
    first, second = memory.pins(128), memory.pins(100)  # 100 bytes take 128
    assert first is not None
    assert second is not None
    assert memory.in_use == 256
    assert memory.pins(1) is None
    del first
    assert memory.in_use == 128
    third = memory.pins(65)
    assert third is not None
    assert memory.in_use == 256


def test_a_view_keeps_its_block_in_use():
    memory = Pins(limit=64)
    whole = memory.pins(64)
    assert whole is not None
    view = whole[3:]
    del whole
    assert memory.pins(1) is None
    del view
    assert memory.pins(1) is not None


def test_the_limit_may_be_set_and_0_pins_nothing():
    memory = Pins(limit=0)
    assert memory.pins(1) is None
    memory.limit = 1
    assert memory.pins(1) is not None


def test_many_small_blocks_that_were_dropped_are_forgotten():
    memory = Pins(limit=2**40)
    for _ in range(5000):
        assert memory.pins(8) is not None
    assert len(memory._lent) < 2500
    assert memory.in_use == 0


@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_it_is_like_the_tensor(shape):
    tensor = torch.randn(shape).to(torch.bfloat16).transpose(0, -1) if shape else torch.tensor(1.0)
    for memory in (HostMemory(), Pins(2**20)):
        found = memory.like(tensor)
        assert (found.shape, found.dtype, found.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
