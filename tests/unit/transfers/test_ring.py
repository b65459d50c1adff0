"""A ring of buffers: everything arrives, complete and in order, through as many buffers as there are."""

import gc
import threading
import weakref

import pytest
import torch
from tests.late import LateStreams

from clearspan.errors import InvalidArgumentError
from clearspan.transfers import Ring, SideStreams

DEADLINE = 20
"""Seconds after which a test that waits has failed."""


class Kept:
    """A consumer that keeps copies of what arrives."""

    def __init__(self):
        self.found, self.buffers, self.error = [], set(), None

    def __call__(self, parcels):
        try:
            for parcel in parcels:
                self.found.append((parcel.label, parcel.tensor.clone()))
                self.buffers.add(parcel.tensor.untyped_storage().data_ptr())
        except BaseException as error:
            self.error = error
            raise


@pytest.mark.parametrize("streams", [SideStreams, LateStreams])
def test_several_tensors_a_batch_and_a_last_part_arrive_in_order(streams):
    batches = [
        {"resid": torch.randn(4, 6), "mask": torch.rand(4, 6) > 0.5, "ids": torch.arange(24).view(4, 6)}
        for _ in range(5)
    ]
    batches.append({name: tensor[:1] for name, tensor in batches[0].items()})
    kept = Kept()
    with Ring(kept, slots=2, slot_bytes=4 * 6 * 8, streams=streams()) as ring:
        for number, batch in enumerate(batches):
            for name, tensor in batch.items():
                ring.put(tensor, (number, name))
    sent = [((number, name), tensor) for number, batch in enumerate(batches) for name, tensor in batch.items()]
    assert [label for label, _ in kept.found] == [label for label, _ in sent]
    assert all(torch.equal(own, there) for (_, own), (_, there) in zip(sent, kept.found, strict=True))
    assert len(kept.buffers) == 2


def test_what_is_written_or_dropped_later_does_not_arrive():
    kept = Kept()
    with torch.inference_mode(), Ring(kept, slots=4, slot_bytes=64, streams=LateStreams()) as ring:
        tensor = torch.zeros(3, 4).T
        for number in range(8):
            ring.put(tensor, number)
            tensor += 1
        del tensor
    assert all(torch.equal(tensor, torch.full((4, 3), float(number))) for number, tensor in kept.found)


def test_a_parcel_may_be_written_into():
    def consume(parcels):
        for parcel in parcels:
            sums.append(parcel.tensor.add_(1).sum().item())

    sums = []
    with torch.inference_mode(), Ring(consume, slots=1, slot_bytes=64) as ring:
        for number in range(3):
            ring.put(torch.full((4,), float(number)), number)
    assert sums == [4, 8, 12]


def test_put_waits_until_the_oldest_buffer_was_consumed():
    may_go_on, was_put, consumed = threading.Semaphore(0), [], []

    def consume(parcels):
        for parcel in parcels:
            assert may_go_on.acquire(timeout=DEADLINE)
            consumed.append((parcel.label, parcel.tensor.tolist()))

    def produce():
        with Ring(consume, slots=3, slot_bytes=8) as ring:
            for number in range(10):
                ring.put(torch.tensor([number]), number)
                was_put.append(number)
                changed.set()

    changed = threading.Event()
    producer = threading.Thread(target=produce)
    producer.start()
    for step in range(10):
        while len(was_put) < min(step + 3, 10):
            assert changed.wait(DEADLINE)
            changed.clear()
        # One buffer is with the consumer, two wait for it: nothing else can have been put in.
        assert not changed.wait(0.01) or len(was_put) == min(step + 3, 10)
        assert len(was_put) == min(step + 3, 10)
        may_go_on.release()
    producer.join(DEADLINE)
    assert consumed == [(number, [number]) for number in range(10)]


def test_what_the_consumer_raises_reaches_a_put_that_waits_and_those_after_it():
    def consume(parcels):
        next(parcels)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), Ring(consume, slots=1, slot_bytes=8) as ring:
        for number in range(3):
            ring.put(torch.tensor([number]), number)
    with pytest.raises(OSError, match="the disk is full"):
        ring.put(torch.tensor([1]), 1)


def test_what_the_consumer_raises_at_the_end_reaches_the_end_of_the_context():
    def consume(parcels):
        for _ in parcels:
            pass
        raise OSError("the file cannot be closed")

    with pytest.raises(OSError, match="the file cannot be closed"), Ring(consume, slots=2, slot_bytes=8) as ring:
        ring.put(torch.tensor([1]), 1)


def test_what_the_body_raises_reaches_the_consumer_after_the_last_parcel():
    kept, error = Kept(), KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as raised, Ring(kept, slots=2, slot_bytes=8) as ring:
        ring.put(torch.tensor([1]), "first")
        ring.put(torch.tensor([2]), "second")
        raise error
    assert raised.value is error
    assert kept.error is error
    assert [label for label, _ in kept.found] == ["first", "second"]


def test_both_sides_may_raise():
    def consume(parcels):
        try:
            list(parcels)
        except ValueError:
            raise OSError("no room for the last part") from None

    with pytest.raises(ValueError, match="wrong") as raised, Ring(consume, slots=2, slot_bytes=8):
        raise ValueError("wrong")
    assert raised.value.__notes__ == ["The consumer of the ring raised OSError('no room for the last part')."]


@pytest.mark.parametrize("puts", [2, 5])
def test_a_consumer_that_returns_early_loses_nothing_quietly(puts):
    with pytest.raises(InvalidArgumentError) as raised, Ring(next, slots=2, slot_bytes=8) as ring:
        for number in range(puts):
            ring.put(torch.tensor([number]), number)
    assert str(raised.value) == (
        "the consumer of a ring returned before its last parcel\n"
        "  reason: what was put in after that would be lost\n"
        "  fix: for parcel in parcels: ..., to the end"
    )


def test_a_tensor_that_is_too_large_raises_and_the_ring_goes_on():
    kept = Kept()
    with Ring(kept, slots=2, slot_bytes=8) as ring:
        with pytest.raises(InvalidArgumentError) as raised:
            ring.put(torch.zeros(3), "large")
        for number in range(4):
            ring.put(torch.zeros(2), number)
    assert str(raised.value) == (
        "the tensor is larger than a buffer of the ring\n"
        "  expected: at most 8 bytes\n"
        "  got: 12 bytes, [3] of torch.float32\n"
        "  fix: Ring(..., slot_bytes=12)"
    )
    assert [label for label, _ in kept.found] == [0, 1, 2, 3]


def test_a_failed_send_gives_its_buffer_back():
    class Fails(LateStreams):
        fails = True

        def send(self, source, target):
            if self.fails:
                raise torch.OutOfMemoryError("no room for a snapshot")
            return super().send(source, target)

    kept, streams = Kept(), Fails()
    with Ring(kept, slots=1, slot_bytes=8, streams=streams) as ring:
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                ring.put(torch.zeros(2), "lost")
        streams.fails = False
        ring.put(torch.zeros(2), "there")
    assert [label for label, _ in kept.found] == ["there"]


def test_closing_releases_buffers_snapshots_and_thread():
    snapshots, buffers = [], []

    class Watched(LateStreams):
        def send(self, source, target):
            snapshots.append(weakref.ref(source))
            buffers.append(weakref.ref(target.untyped_storage()))
            return super().send(source, target)

    with Ring(Kept(), slots=2, slot_bytes=8, streams=Watched()) as ring:
        for number in range(5):
            ring.put(torch.tensor([number]), number)
    gc.collect()
    assert not any(one() is not None for one in [*snapshots, *buffers])
    assert not ring._thread.is_alive()
    with pytest.raises(InvalidArgumentError, match="the ring is closed"):
        ring.put(torch.tensor([1]), 1)


def test_a_ring_has_buffers():
    for slots, slot_bytes in ((0, 8), (1, 0)):
        with pytest.raises(InvalidArgumentError):
            Ring(next, slots, slot_bytes)
    with pytest.raises(InvalidArgumentError) as raised:
        Ring(3, 1, 8)
    assert str(raised.value) == "consume=3\n  expected: a function of an iterator of parcels"
    with pytest.raises(InvalidArgumentError, match="expected: Tensor"), Ring(list, 1, 8) as ring:
        ring.put([1], 1)
