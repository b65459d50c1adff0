"""What an accelerator's module is asked for is there, and on an accelerator the order holds."""

import inspect

import pytest
import torch
from tests import zoo

import clearspan
from clearspan.transfers import PINNED, WITH_STREAMS, HostMemory, Outbound, Ring, numbers_on, on_device

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
HAS_STREAMS = ACCELERATOR is not None and ACCELERATOR.type in WITH_STREAMS
on_accelerator = pytest.mark.skipif(not HAS_STREAMS, reason="there is no accelerator with streams")


@pytest.mark.parametrize("kind", [*WITH_STREAMS, "cpu"])
def test_the_module_of_a_device_has_what_is_asked_of_it(kind):
    device = torch.device(kind, 0)
    module = torch.get_device_module(device)
    make = module.Stream.__init__ if kind == "cpu" else module.Stream.__new__
    inspect.signature(make).bind(None, device)
    for function in (module.current_stream, module.stream):
        inspect.signature(function).bind(device)
    for method in (module.Event.record, module.Stream.wait_stream):
        inspect.signature(method).bind(None, None)
    for method in (module.Event.query, module.Event.synchronize):
        inspect.signature(method).bind(None)


def test_numbers_and_tensors_reach_a_device():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert torch.equal(numbers_on(cpu, [[1, 2], range(2)]), torch.tensor([[1, 2], [0, 1]]))
    assert numbers_on(meta, 3).device == meta
    tensor = torch.ones(2)
    assert on_device(tensor, cpu) is tensor


# --- on an accelerator -----------------------------------------------------------------------------------------------


def busy(size=4096, times=50):
    """Has the accelerator work for a while, and returns a tensor that is ones when it is done."""
    matrix = torch.eye(size, device=ACCELERATOR)
    for _ in range(times):
        matrix = matrix @ matrix
    return matrix.amax(1)


@on_accelerator
@pytest.mark.parametrize("in_flight", [0, 2**30])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_copies_wait_for_what_made_the_tensor_and_not_for_what_comes_later(limit, in_flight):
    with Outbound(HostMemory(limit), in_flight=in_flight) as there:
        tensor = busy()
        copies = [there.copy(tensor)]
        for _ in range(20):
            tensor += 1
            copies.append(there.copy(tensor))
        del tensor
        overwrites = [torch.full((4096,), -1.0, device=ACCELERATOR) for _ in range(100)]
    assert all(torch.equal(copied, torch.full((4096,), 1.0 + number)) for number, copied in enumerate(copies))
    assert all(copied.is_pinned() == bool(limit) for copied in copies)
    assert all(bool((one == -1).all()) for one in overwrites)


@on_accelerator
def test_a_ring_brings_what_was_put_in():
    found = []

    def consume(parcels):
        found.extend((parcel.label, parcel.tensor.clone()) for parcel in parcels)

    with Ring(consume, slots=3, slot_bytes=4 * 4096) as ring:
        tensor = busy()
        for number in range(20):
            ring.put(tensor, number)
            tensor += 1
    assert [label for label, _ in found] == list(range(20))
    assert all(torch.equal(tensor, torch.full((4096,), 1.0 + number)) for number, tensor in found)


@on_accelerator
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("variant", ["llama", "falcon", "gpt_bigcode"])
def test_a_cache_on_the_cpu_is_the_one_on_the_accelerator(variant, mode):
    bridge = clearspan.boot(zoo.build(variant).to(ACCELERATOR))
    tokens = torch.arange(2 * 40).view(2, 40) % 97
    with mode():
        for pos_slice in (None, (1, 30), torch.tensor([3, 1])):
            kept = bridge.run_with_cache(tokens, pos_slice=pos_slice)[1]
            sent = bridge.run_with_cache(tokens, pos_slice=pos_slice, device="cpu")[1]
            for cache in (sent, kept.to("cpu")):
                assert list(cache) == list(kept)
                assert all(torch.equal(cache[name], kept[name].cpu()) for name in kept if "attn" not in name)
                assert all(torch.allclose(cache[name], kept[name].cpu(), atol=1e-4) for name in kept)
            assert sent[next(iter(sent))].is_pinned()


@on_accelerator
def test_blocks_of_dropped_caches_are_given_out_again():
    bridge = clearspan.boot(zoo.build("llama").to(ACCELERATOR))
    before, addresses = PINNED.in_use, set()
    for _ in range(4):
        cache = bridge.run_with_cache(torch.arange(40)[None], "blocks.1.hook_resid_post", device="cpu")[1]
        addresses.add(cache["resid_post", 1].data_ptr())
        assert PINNED.in_use > before
        del cache
    assert PINNED.in_use == before
    assert len(addresses) < 4
