"""Caches that are sent to the CPU beside the computation hold what the model made, however late it is copied.

The device `meta` stands for the CPU, and the CPU for an accelerator whose side stream copies when somebody waits.
"""

import gc

import pytest
import torch
import transformers
from tests import zoo
from tests.late import LateStreams
from torch.multiprocessing.reductions import StorageWeakRef

import clearspan
from clearspan import cache as cache_module
from clearspan._cache import plan
from clearspan._run import caching
from clearspan.hf.storages import Relocation, storages
from clearspan.interventions import Intervention, Scale
from clearspan.transfers import Outbound

TOKENS = torch.tensor([[5, 9, 3, 7, 11], [2, 4, 6, 8, 10]])
IN_PLACE = "falcon"
VARIANTS = ["llama", "llama eager", IN_PLACE, "falcon alibi", "gpt_bigcode", "opt", "bloom", "mixtral", "deepseek_v3"]


class Late(Outbound):
    """Sends tensors of the CPU, as late as one may."""

    def __init__(self):
        super().__init__(streams=LateStreams(), kinds=("cpu",), in_flight=2**14)


class Away(Relocation):
    """Brings tensors to `meta`, which stands for the CPU: those that it brought are there."""

    def __init__(self, device, copies=None, outbound=None):
        super().__init__(device, copies, outbound)
        self._there = []

    def __call__(self, tensor):
        is_there = any(tensor.untyped_storage()._cdata == there.untyped_storage()._cdata for there in self._there)
        return tensor if is_there else super().__call__(tensor)

    def _bring(self, tensor):
        assert self._outbound is not None
        self._there.append(self._outbound.copy(tensor))
        return self._there[-1]


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    for module in (caching, cache_module):
        monkeypatch.setattr(module, "Outbound", Late)
    for module in (plan, cache_module):
        monkeypatch.setattr(module, "Relocation", Away)


def check_same(sent, kept):
    assert list(sent) == list(kept) != []
    for name in kept:
        assert torch.equal(sent[name], kept[name]), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_entry_is_what_the_model_made(variant, mode):
    bridge = clearspan.boot(zoo.build(variant))
    with mode():
        kept = bridge.run_with_cache(TOKENS)[1]
        sent = bridge.run_with_cache(TOKENS, device="meta")[1]
        check_same(sent, kept)
        assert storages(sent._recording.tensors()).keys().isdisjoint(storages(kept._recording.tensors()))


@pytest.mark.parametrize("pos_slice", [-1, (1, 4), torch.tensor([0, 3])])
@pytest.mark.parametrize("variant", ["llama", IN_PLACE, "gpt_bigcode"])
def test_some_positions(variant, pos_slice):
    bridge = clearspan.boot(zoo.build(variant))
    kept = bridge.run_with_cache(TOKENS, pos_slice=pos_slice)[1]
    check_same(bridge.run_with_cache(TOKENS, pos_slice=pos_slice, device="meta")[1], kept)


def test_under_autocast():
    bridge = clearspan.boot(zoo.build("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        kept = bridge.run_with_cache(TOKENS)[1]
        check_same(bridge.run_with_cache(TOKENS, device="meta")[1], kept)


def test_storages_that_were_shared_are_shared_there():
    bridge = clearspan.boot(zoo.build("gpt_bigcode"))
    kept = bridge.run_with_cache(TOKENS)[1]
    assert bridge.run_with_cache(TOKENS, device="meta")[1].nbytes == kept.nbytes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hooks_and_interventions_write_what_is_sent(mode):
    bridge = clearspan.boot(zoo.build("llama"))
    changes = [Intervention("blocks.1.hook_resid_mid", Scale(2.0)), Intervention("blocks.2.attn.hook_z", Scale(0.5))]
    with mode():
        kept = bridge.run_with_cache(TOKENS, interventions=changes, device="cpu")[1]
        check_same(bridge.run_with_cache(TOKENS, interventions=changes, device="meta")[1], kept)


def test_after_a_kv_cache_that_goes_on():
    bridge = clearspan.boot(zoo.build("llama"))
    past = [transformers.StaticCache(bridge.hf_model.config, max_cache_len=16) for _ in range(2)]
    for one in past:
        bridge(TOKENS, past_key_values=one)
    kept = bridge.run_with_cache(TOKENS[:, :2], past_key_values=past[0])[1]
    sent = bridge.run_with_cache(TOKENS[:, :2], past_key_values=past[1], device="meta")[1]
    check_same(sent, kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hook_of_the_users_that_writes_in_place_is_not_copied_into_what_came_before(mode):
    model = zoo.build("llama")
    bridge = clearspan.boot(model)
    names = ["blocks.0.hook_resid_post"]
    expected = bridge.run_with_cache(TOKENS, names)[1][names[0]].clone()

    def write(_, args):
        args[0].mul_(2)

    model.model.layers[1].register_forward_pre_hook(write)
    with mode():
        sent = bridge.run_with_cache(TOKENS, names, device="meta")[1]
        assert torch.equal(sent[names[0]], expected)


def test_a_cache_that_is_moved_is_complete():
    bridge = clearspan.boot(zoo.build("gpt_bigcode"))
    kept = bridge.run_with_cache(TOKENS, incl_bwd=True)[1]
    check_same(kept.to("meta"), kept)


def test_a_cache_of_a_generation_that_is_moved_is_complete():
    bridge = clearspan.boot(zoo.build("llama"))
    kept = bridge.generate(TOKENS, max_new_tokens=4, do_sample=False, return_cache=True)[1]
    sent = kept.to("meta")
    check_same(sent, kept)


def test_copies_are_freed_as_soon_as_their_cache_is_dropped():
    bridge = clearspan.boot(zoo.build("gpt_bigcode"))
    gc.collect()
    gc.disable()  # pinned memory that waits for a collection would be allocated anew in each run
    try:
        sent = bridge.run_with_cache(TOKENS, device="meta")[1]
        copies = [StorageWeakRef(tensor.untyped_storage()) for tensor in sent._recording.tensors()]
        del sent
        assert copies
        assert all(copied.expired() for copied in copies)
    finally:
        gc.enable()


def test_a_run_that_raises_leaves_the_model_as_it_was():
    bridge = clearspan.boot(zoo.build("llama"))
    kept = bridge.run_with_cache(TOKENS)[1]

    def fail(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bridge.run_with_cache(TOKENS, fwd_hooks=[("blocks.2.hook_resid_post", fail)], device="meta")
    gc.collect()
    check_same(bridge.run_with_cache(TOKENS, device="meta")[1], kept)
