"""Tensors brought to a device: each storage once, and the same numbers in the same layout."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from clearspan.hf.storages import Copies, Relocation, storages


class Clones(Relocation):
    """Brings tensors from a device to itself, as if it were another one."""

    def __init__(self, copies=None):
        super().__init__("meta", copies)
        self.brought = 0

    def _bring(self, tensor):
        self.brought += 1
        return tensor.clone()


def views():
    base = torch.randn(4, 6)
    return {
        "whole": base,
        "transposed": base.T,
        "heads": base.view(4, 2, 3).transpose(0, 1),
        "expanded": torch.randn(4, 1, 6).expand(4, 5, 6),
        "part": base[:, 2:5],
        "row": base[1],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "integers": torch.arange(6).view(2, 3),
    }


@pytest.mark.parametrize("kind", views())
def test_numbers_stay(kind):
    tensor = views()[kind]
    moved = Clones()(tensor)
    assert torch.equal(moved, tensor)
    assert moved.untyped_storage()._cdata != tensor.untyped_storage()._cdata
    assert moved.untyped_storage().nbytes() <= tensor.untyped_storage().nbytes()


def test_one_storage_is_brought_once():
    base, there = torch.randn(4, 6), Clones()
    moved = [there(base), there(base.T), there(base[1]), there(base.detach().view(2, 12)), there(base[:, 2:])]
    assert there.brought == 1
    assert storages(moved).keys() == storages(moved[:1]).keys()
    assert torch.equal(moved[4], base[:, 2:])


def test_of_a_part_only_the_part_is_brought():
    base, there = torch.randn(100, 6), Clones()
    assert sum(storages([there(base[:2]), there(base[:2]), there(base[3:4])]).values()) == 3 * 6 * 4
    assert there.brought == 2


def test_what_was_written_since_is_brought_anew():
    base, there = torch.zeros(3), Clones()
    first = there(base)
    base += 1
    assert torch.equal(there(base), torch.ones(3))
    assert torch.equal(first, torch.zeros(3))


@pytest.mark.parametrize("is_alone", [True, False])
def test_under_inference_mode_writes_are_not_counted(is_alone):
    there = Clones(Copies(is_alone))
    with torch.inference_mode():
        base = torch.zeros(3)
        there(base), there(base)
    assert there.brought == (1 if is_alone else 2)


def test_no_source_is_kept_alive_and_no_address_is_taken_for_another():
    there = Clones()
    for _ in range(20):
        tensor = torch.randn(1000)
        source = StorageWeakRef(tensor.untyped_storage())
        moved = there(tensor)
        assert torch.equal(moved, tensor)
        del tensor
        assert source.expired()
    assert there.brought == 20


def test_what_is_there_stays():
    tensor = torch.randn(3)
    assert Relocation("cpu")(tensor) is tensor
