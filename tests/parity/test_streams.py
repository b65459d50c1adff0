"""Residuals of several streams: hyper-connections (DeepSeek-V4, HY4, Qwen 4) and AltUp (Gemma 3n)."""

import functools
import warnings

import pytest
import torch

import clearspan
from clearspan import TransformerBridge, zoo
from clearspan.components import (
    CutGateMLPBridge,
    HyperConnectionBridge,
    MultiStreamBlockBridge,
    OpaqueAttentionBridge,
)
from clearspan.errors import AbsentPointError, DerivedWarning, InputError, InvalidArgumentError

TYPES = ("deepseek_v4", "hy_v4", "qwen4_exp_text", "gemma3n_text")


@functools.cache
def made(model_type: str) -> TransformerBridge:
    """A bridge that no test may leave changed."""
    with warnings.catch_warnings(action="ignore", category=DerivedWarning):
        return clearspan.boot(zoo.build(model_type))


def ids_for(bridge: TransformerBridge) -> torch.Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=TYPES)
def bridge(request: pytest.FixtureRequest) -> TransformerBridge:
    return made(request.param)


def connection(bridge: TransformerBridge, layer: int, name: str) -> HyperConnectionBridge:
    part = bridge.blocks[layer].submodules[name]
    assert isinstance(part, HyperConnectionBridge)
    return part


def test_streams_enter_and_leave_blocks(bridge):
    block = bridge.blocks[0]
    assert isinstance(block, MultiStreamBlockBridge)
    n_streams = block.streams.n_streams
    ids = ids_for(bridge)
    _, cache = bridge.run_with_cache(ids)
    assert cache["streams_pre", 0].shape == (*ids.shape, n_streams, bridge.cfg.d_model)
    assert torch.equal(cache["blocks.1.hook_streams"], cache["streams_pre", 1])
    assert torch.equal(cache["streams_post", 0], cache["streams_pre", 1])
    assert torch.equal(cache["streams_pre", 0][:, :, 0], cache["embed"])


def test_each_stream_can_be_written(bridge):
    """The last stream of one position reaches the logits from there on, and none before."""
    ids = ids_for(bridge)

    def write(value, hook):
        value[:, 5, -1] *= -1

    plain = bridge(ids)
    written = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_streams_pre", write)])
    changed = (written - plain).abs().amax(-1) > 1e-4
    assert not changed[:, :5].any()
    assert changed[:, 5].all()


def test_what_needs_one_stream_is_refused_by_name(bridge):
    _, cache = bridge.run_with_cache(ids_for(bridge))
    assert bridge.why_absent("blocks.0.hook_resid_pre").startswith("the residual is several streams")
    with pytest.raises(AbsentPointError, match="no one of them is what the parts of the model read"):
        bridge.hook_dict["blocks.0.hook_resid_post"]
    calls = (
        cache.accumulated_resid,
        cache.decompose_resid,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
    )
    for call in calls:
        with pytest.raises(InvalidArgumentError) as raised:
            call()
        said = str(raised.value)
        assert said.startswith("this model has no one residual stream")
        assert f"its residual is {bridge.blocks[0].streams.n_streams} streams" in said


def test_mixing_weights_are_told_where_streams_differ():
    """The streams that enter the first block are the same, which tells nothing of how they are mixed."""
    bridge = made("deepseek_v4")
    for layer in range(bridge.cfg.n_layers):
        for name in ("attn_connection", "mlp_connection"):
            part = connection(bridge, layer, name)
            assert (part.mix, part.mix_is_transposed, part.write, part.collapse) == (1, False, 0, 2)
    ids = ids_for(bridge)
    _, cache = bridge.run_with_cache(ids)
    mix, write = (cache[f"blocks.1.mlp_connection.hook_{name}"] for name in ("mix", "write"))
    mixed = torch.einsum("bpsd,bpst->bptd", cache["streams_mid", 1], mix)
    found = mixed + write.unsqueeze(-1) * cache["mlp_out", 1].unsqueeze(-2)
    assert torch.allclose(found, cache["streams_post", 1], atol=1e-5)


def test_attention_to_compressed_keys_shows_what_is_by_position():
    bridge = made("deepseek_v4")
    sliding, compressed = (bridge.blocks[layer].submodules["attn"] for layer in (0, 1))
    assert isinstance(sliding, OpaqueAttentionBridge)
    assert (sliding.keys_are_positions, sliding.has_sinks, sliding.n_kv_heads) == (True, True, 1)
    assert isinstance(compressed, OpaqueAttentionBridge)
    assert not compressed.keys_are_positions
    assert "blocks.0.attn.hook_pattern" in bridge.hook_dict
    assert "compressed blocks" in bridge.why_absent("blocks.1.attn.hook_pattern")
    assert "blocks.1.attn.hook_z" in bridge.hook_dict


def test_experts_by_token_cannot_run_without_tokens():
    bridge = made("deepseek_v4")
    _, cache = bridge.run_with_cache(ids_for(bridge))
    with pytest.raises(InvalidArgumentError, match="given the tokens"):
        bridge.blocks[0].mlp(cache["blocks.0.mlp.hook_in"])
    with pytest.raises(InvalidArgumentError, match="needs the tokens"):
        bridge(cache["streams_pre", 1], start_at_layer=1)


def test_runs_of_some_blocks_take_and_give_streams():
    bridge = made("hy_v4")
    ids = ids_for(bridge)
    logits, cache = bridge.run_with_cache(ids)
    assert torch.equal(bridge(ids, stop_at_layer=1), cache["streams_pre", 1])
    assert torch.allclose(bridge(cache["streams_pre", 0], start_at_layer=0), logits, atol=1e-5)
    assert torch.allclose(bridge(cache["streams_post", 1], start_at_layer=2), logits, atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="layer 1 uses what layer 0 found"):
        bridge(cache["streams_pre", 1], start_at_layer=1)
    with pytest.raises(InputError) as raised:
        bridge(cache["embed"], start_at_layer=0)
    assert "[batch, pos, stream=2, d_model=64]" in str(raised.value)


def test_streams_that_share_an_axis_are_shown_apart():
    bridge = made("qwen4_exp_text")
    first, second = bridge.blocks
    assert isinstance(first, MultiStreamBlockBridge)
    assert isinstance(second, MultiStreamBlockBridge)
    assert first.streams.is_joined
    assert (first.adds_first, second.adds_first) == (True, False)
    assert connection(bridge, 1, "attn_connection").hands_on
    _, cache = bridge.run_with_cache(ids_for(bridge))
    read = cache["streams_pre", 0] + cache["streams_added", 0]
    assert torch.allclose(read, cache["blocks.0.mixer_connection.hook_in"])
    assert "nothing is added" in bridge.why_absent("blocks.1.hook_streams_added")


def test_altup_predicts_the_stream_that_sublayers_read():
    bridge = made("gemma3n_text")
    _, cache = bridge.run_with_cache(ids_for(bridge))
    assert torch.equal(cache["active_pre", 1], cache["blocks.1.ln1.hook_in"])
    half = 0.5**0.5
    added = cache["attn_out", 1] + cache["blocks.1.hook_laurel_out"]
    assert torch.allclose(cache["active_pre", 1] * half + added, cache["active_mid", 1], atol=1e-5)
    assert torch.allclose(cache["active_mid", 1] + cache["mlp_out", 1], cache["active_post", 1], atol=1e-5)


def test_a_gate_that_is_cut_off_is_shown_after_it():
    bridge = made("gemma3n_text")
    assert [isinstance(block.mlp, CutGateMLPBridge) for block in bridge.blocks] == [True, False, False, False]
    _, cache = bridge.run_with_cache(ids_for(bridge))
    assert float((cache["pre", 0] == 0).float().mean()) > 0.3
    assert not (cache["pre", 1] == 0).any()


def test_generation_reaches_streams(bridge):
    ids = ids_for(bridge)
    made_ids, cache = bridge.generate(ids, return_cache=True, max_new_tokens=2, do_sample=False)
    assert cache["streams_post", 1].shape[1] == made_ids.shape[1] - 1
    whole = bridge.run_with_cache(made_ids[:, :-1])[1]["streams_post", 1]
    assert torch.allclose(cache["streams_post", 1], whole, atol=1e-4)


def test_norms_are_folded_into_what_reads_them():
    """What chooses keys reads the first norm too, so that it stays; the others go into maps."""
    bridge = made("hy_v4")
    ids = ids_for(bridge)
    folded = bridge.processed()
    assert torch.allclose(folded(ids).log_softmax(-1), bridge(ids).log_softmax(-1), atol=1e-4)
