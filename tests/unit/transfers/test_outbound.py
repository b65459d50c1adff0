"""Copies on the CPU: exact, in the layout of the tensor, and complete when the context closes."""

import gc
import weakref

import pytest
import torch
from tests.late import LateStreams

from clearspan.transfers import Outbound, SideStreams, on_cpu


def outbound(streams=None, **options):
    """Returns one that sends tensors of the CPU, as if that were an accelerator."""
    return Outbound(streams=streams or LateStreams(), kinds=("cpu",), **options)


@pytest.mark.parametrize("streams", [SideStreams, LateStreams])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_copies_have_the_values_and_the_layout(dtype, streams):
    base = torch.randn(4, 3, 5).to(dtype)
    tensors = [base, base.transpose(0, 1), base[:, 1], base.new_zeros(()), base.new_zeros(0, 2)]
    with outbound(streams()) as there:
        copies = [there.copy(tensor) for tensor in tensors]
    for tensor, copied in zip(tensors, copies, strict=True):
        assert torch.equal(copied, tensor)
        assert copied.dtype == dtype
        assert copied.stride() == tensor.clone().stride()
        assert not copied.numel() or copied.data_ptr() != tensor.data_ptr()


def test_what_is_written_or_dropped_later_does_not_reach_the_copy():
    with outbound() as there:
        tensor = torch.zeros(3)
        first = there.copy(tensor)
        tensor += 1
        second = there.copy(tensor)
        tensor += 1
        del tensor
    assert torch.equal(first, torch.zeros(3))
    assert torch.equal(second, torch.ones(3))


@pytest.mark.parametrize("most", [0, 40, 400])
def test_the_bytes_in_flight_are_bounded(most):
    snapshots = []

    class Watched(LateStreams):
        def send(self, source, target):
            snapshots.append(weakref.ref(source))
            return super().send(source, target)

    tensors, copies = [torch.full((10,), float(number)) for number in range(20)], []
    with outbound(Watched(), in_flight=most) as there:
        for tensor in tensors:
            copies.append(there.copy(tensor))
            assert 40 * sum(one() is not None for one in snapshots) <= most
    assert all(torch.equal(copied, tensor) for copied, tensor in zip(copies, tensors, strict=True))
    assert not any(one() is not None for one in snapshots)


def test_an_exception_waits_for_nothing_and_keeps_nothing():
    class Never:
        def synchronize(self):
            raise AssertionError("nobody waits")

        query = synchronize

    class Stuck(LateStreams):
        def send(self, source, target):
            found.append(weakref.ref(source))
            return super().send(source, target).__class__(source, Never())

    found = []
    with pytest.raises(KeyboardInterrupt), outbound(Stuck()) as there:
        there.copy(torch.ones(3))
        raise KeyboardInterrupt
    gc.collect()
    assert found[0]() is None


def test_a_copy_on_the_graph_stays_on_it():
    weight = torch.ones(3, requires_grad=True)
    with outbound() as there:
        copied = there.copy(weight * 2)
    copied.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    with torch.no_grad(), outbound() as there:
        assert not there.copy(weight).requires_grad


def test_inference_tensors_stay_inference_tensors():
    with torch.inference_mode(), outbound() as there:
        copied = there.copy(torch.ones(3))
    assert copied.is_inference()
    assert torch.equal(copied, torch.ones(3))


def test_what_is_on_the_cpu_stays():
    tensor = torch.ones(3)
    assert on_cpu([tensor])[0] is tensor
