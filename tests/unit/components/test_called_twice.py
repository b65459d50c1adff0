"""Modules that a model calls several times in a forward: each call is a place of its own."""

import threading

import pytest
import torch
from tests.releases import start_checkpointing
from tests.structures import GROUPED, RMS_NORM, assert_verified, bridged, levels, linears, norms, tiny, tokens

from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    MLPBridge,
    NormalizationBridge,
    UnembeddingBridge,
)
from clearspan.errors import PointNotReachedError
from clearspan.points import Layout


def nanochat(first=None, **settings):
    """Its `model.norm` norms the embedding and the last stream; queries and keys are normed after rotation."""

    def mapping(cfg):
        heads = {
            key: NormalizationBridge(
                name=key, axes=f"batch pos {axis} d_head", layout=Layout.HEADS_FIRST, uses_rms_norm=True
            )
            for key, axis in (("q_norm", "head"), ("k_norm", "kv_head"))
        }
        maps = linears(q="q_proj", k="k_proj", v="v_proj", o="o_proj")
        parts = {
            "ln1": NormalizationBridge(name="input_layernorm", **(first or {})),
            "attn": AttentionBridge(
                name="self_attn", has_rotary=True, norms_rotated=True, submodules={**maps, **heads}
            ),
            **norms(ln2="post_attention_layernorm"),
            "mlp": MLPBridge(name="mlp", submodules=linears(in_="fc1", out="fc2")),
        }
        return {
            "embed": EmbeddingBridge(name="model.embed_tokens", ends_at="model.norm", ends_at_call=0),
            "embed_norm": NormalizationBridge(name="model.norm", call=0),
            "blocks": BlockBridge(name="model.layers", submodules=parts),
            "ln_final": NormalizationBridge(name="model.norm", call=1),
            "unembed": UnembeddingBridge(name="lm_head", softcap=cfg.hf["final_logit_softcapping"]),
        }

    model = tiny("NanoChat", **{**GROUPED, "attention_bias": False, **settings})
    return bridged(model, mapping, config_values=RMS_NORM)


@levels
def test_all_of_verify(level):
    assert_verified(nanochat(), level)


def seen_by_plain_hooks(bridge, run):
    outputs = []
    handle = bridge.hf_model.model.norm.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    with torch.no_grad():
        run()
    handle.remove()
    return outputs


def test_each_call_is_kept_listened_to_and_written_on_its_own():
    bridge = nanochat()
    ids = tokens(bridge.hf_model)
    first, last = seen_by_plain_hooks(bridge, lambda: bridge(ids))
    _, cache = bridge.run_with_cache(ids)
    assert torch.equal(cache["hook_embed"], first)
    assert torch.equal(cache["ln_final.hook_out"], last)
    heard = {}
    names = ["embed_norm.hook_out", "ln_final.hook_in", "ln_final.hook_scale", "ln_final.hook_out"]
    hooks = [(name, lambda value, hook: heard.setdefault(hook.name, []).append(value.clone())) for name in names]
    bridge.run_with_hooks(ids, fwd_hooks=hooks)
    assert {name: len(values) for name, values in heard.items()} == {
        "embed_norm.hook_out": 1,
        "ln_final.hook_in": 1,
        "ln_final.hook_scale": 1,
        "ln_final.hook_out": 1,
    }
    assert torch.equal(heard["ln_final.hook_out"][0], last)
    with bridge.hooks(fwd_hooks=[("ln_final.hook_out", lambda value, hook: value * 0)]):
        logits, edited = bridge.run_with_cache(ids)
    assert torch.equal(edited["resid_post", 2], cache["resid_post", 2])
    assert not logits.any()


def test_each_forward_of_a_generation_counts_anew():
    bridge = nanochat()
    ids = tokens(bridge.hf_model)
    made, cache = bridge.generate(ids, max_new_tokens=4, do_sample=False, return_cache=True)
    _, once = bridge.run_with_cache(made[:, :-1])
    for name in ("hook_embed", "ln_final.hook_in", "ln_final.hook_out"):
        assert torch.allclose(cache[name], once[name], atol=1e-4), name
    lengths = []
    with bridge.hooks(fwd_hooks=[("ln_final.hook_out", lambda value, hook: lengths.append(value.shape[1]))]):
        bridge.generate(ids, max_new_tokens=4, do_sample=False)
    assert lengths == [9, 1, 1, 1]


def test_a_forward_that_breaks_off_leaves_no_count():
    bridge = nanochat()
    ids = tokens(bridge.hf_model)
    heard, fails = [], [True]

    def fail(value, hook):
        if fails.pop():
            raise ZeroDivisionError
        fails.append(False)

    hooks = [("blocks.1.hook_resid_pre", fail), ("ln_final.hook_out", lambda value, hook: heard.append(value))]
    with bridge.hooks(fwd_hooks=hooks):
        with pytest.raises(ZeroDivisionError):
            bridge(ids)
        fails.append(False)
        bridge(ids)
    assert len(heard) == 1


def test_a_part_called_alone_is_the_call_that_it_names():
    bridge = nanochat()
    heard = []
    names = ("embed_norm.hook_out", "ln_final.hook_out")
    hooks = [(name, lambda value, hook: heard.append(hook.name)) for name in names]
    value = torch.randn(1, 3, 48)
    with bridge.hooks(fwd_hooks=hooks):
        bridge.ln_final(value)
        bridge.embed_norm(value)
    assert heard == ["ln_final.hook_out", "embed_norm.hook_out"]


def test_bare_forwards_in_other_threads_do_not_count():
    bridge = nanochat()
    ids = tokens(bridge.hf_model)
    inside, go_on, heard = threading.Event(), threading.Event(), []

    def wait(value, hook):
        inside.set()
        assert go_on.wait(20)

    def other():
        inside.wait(20)
        with torch.no_grad():
            bridge.hf_model(ids)
        go_on.set()

    thread = threading.Thread(target=other)
    thread.start()
    hooks = [("blocks.1.hook_resid_pre", wait), ("ln_final.hook_out", lambda value, hook: heard.append(value.clone()))]
    bridge.run_with_hooks(ids, fwd_hooks=hooks)
    thread.join()
    last = bridge.run_with_cache(ids)[1]["ln_final.hook_out"]
    assert len(heard) == 1
    assert torch.equal(heard[0], last)


def test_gradient_checkpointing_is_refused_where_calls_cannot_be_told():
    bridge = nanochat(first={"call": 0})
    bridge.hf_model.train()
    start_checkpointing(bridge.hf_model)
    with bridge.hooks(fwd_hooks=[("blocks.1.ln1.hook_out", lambda value, hook: value * 2)]):
        loss = bridge(tokens(bridge.hf_model), return_type="loss")
        with pytest.raises(PointNotReachedError) as raised:
            loss.backward()
    assert str(raised.value) == (
        "gradient checkpointing calls a module again that has hooks, and that the model calls several times\n"
        "  where: output of model.layers.1.input_layernorm, call 0\n"
        "  reason: which call of the forward this is cannot be told\n"
        "  fix: model.gradient_checkpointing_disable()"
    )
