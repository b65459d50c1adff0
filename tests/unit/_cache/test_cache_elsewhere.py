"""A cache kept on another device: each value leaves as it appears. Here the other device is meta."""

import pytest
import torch
from tests.zoo import MODELS, build
from torch.multiprocessing.reductions import StorageWeakRef

import clearspan
from clearspan.hf.storages import storages


def made_and_left(model):
    """Has each module note what it made, and the last one what of the first block's is still alive at its own turn."""
    made, alive = {}, []

    def note(path):
        def hook(_, args, output):
            for tensor in (*args, *(output if isinstance(output, tuple) else (output,))):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    made.setdefault(path, []).append(StorageWeakRef(tensor.untyped_storage()))

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(note(path))
    model.get_output_embeddings().register_forward_hook(
        lambda *_: alive.extend(path for path, found in made.items() if any(not one.expired() for one in found))
    )
    return made, alive


@pytest.mark.parametrize("terms", [{}, {"pos_slice": (1, 5)}], ids=str)
@pytest.mark.parametrize("variant", MODELS)
def test_nothing_is_kept_where_the_model_is(variant, terms):
    model = build(variant)
    bridge = clearspan.boot(model)
    made, alive = made_and_left(model)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.randint(1, 97, (2, 7)), device="meta", return_type=None, **terms)
    assert all(tensor.is_meta for tensor in cache._recording.tensors())
    assert all(one.expired() for found in made.values() for one in found), "something is alive after the run"
    # At the unembedding the blocks' own tensors are gone: what is left is the stream on its way through the last norm.
    assert len(made) > 20
    assert [path for path in alive if ".0." in path or ".1." in path] == []


@pytest.mark.parametrize("variant", MODELS)
def test_what_shared_a_storage_shares_one_there(variant):
    bridge = clearspan.boot(build(variant))
    ids = torch.randint(1, 97, (2, 7))
    with torch.no_grad():
        _, here = bridge.run_with_cache(ids)
        _, there = bridge.run_with_cache(ids, device="meta")
    assert list(here) == list(there)
    assert there.nbytes <= here.nbytes
    assert len(storages(there._recording.tensors())) <= len(storages(here._recording.tensors()))


def test_positions_that_are_picked_twice_are_kept_once(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"], pos_slice=[1, 3])
    assert cache.nbytes == 2 * 2 * 48 * 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_write_between_two_names_of_a_storage_is_seen(context, bridge, tokens):
    """`hook_resid_mid` is written in place, in the storage that the norm reads."""
    names = ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in", "blocks.1.ln2.hook_scale", "blocks.1.hook_resid_post"]
    hooks = [("blocks.1.hook_resid_mid", lambda value, hook: value * 2)]
    with context(), bridge.hooks(hooks):
        _, whole = bridge.run_with_cache(tokens, names)
        _, picked = bridge.run_with_cache(tokens, names, pos_slice=(0, 5))
    for name in names:
        assert torch.equal(picked[name], whole[name][:, :5]), name
