"""Attention that asks for the name of its implementation runs as it does unobserved; reading never changes a kernel."""

import pickle
import threading

import pytest
import torch
from tests.zoo import MODELS, build
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import clearspan
from clearspan.hf.attention import ObservedConfig, ObservedName
from clearspan.hf.observers import observed, uses_interface
from clearspan.points import Side

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0


def asking(model):
    """Has a model's attention ask, as some of transformers do, which implementation runs: others would be halved."""
    kind = type(model.model.layers[0].self_attn)

    class Asking(kind):
        def forward(self, hidden_states, *args, **kwargs):
            assert "sdpa" in ALL_ATTENTION_FUNCTIONS  # named here, as where the function is looked up
            named = self.config._attn_implementation in ("eager", "sdpa", "flex_attention")
            same = self.config._attn_implementation == model.config._attn_implementation
            assert not self.config._attn_implementation.startswith("clearspan")
            output, weights = super().forward(hidden_states, *args, **kwargs)
            return (output if named and same else output / 2), weights

    Asking.__module__ = kind.__module__
    for layer in model.model.layers:
        layer.self_attn.__class__ = Asking
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_that_asks_for_its_name_runs_as_unobserved(implementation):
    model = asking(build("llama", attn_implementation=implementation))
    bridge = clearspan.boot(model)
    seen = []
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        for point in ("hook_rot_q", "hook_rot_k"):
            name = f"blocks.1.attn.{point}"
            assert torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=[(name, lambda v, hook: seen.append(v))]), expected)
            assert torch.equal(bridge.run_with_cache(IDS, name)[0], expected)
        logits, cache = bridge.run_with_cache(IDS)
        assert torch.equal(logits, expected)
        torch.testing.assert_close(cache["pattern", 1].sum(-1), torch.ones(2, 4, 9))
        scored = bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda v, hook: seen.append(v))])
        torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_sparse_indexer_that_asks_for_the_name_chooses_the_same_keys(implementation):
    """A type without an adapter, at the level of observers: keys that it leaves out have no weight in the pattern."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=20,
        qk_rope_head_dim=8,
        v_head_dim=10,
        qk_nope_head_dim=12,
        index_topk=3,
        index_n_heads=2,
        index_head_dim=16,
        max_position_embeddings=64,
        attn_implementation=implementation,
    )
    model = DeepseekV32ForCausalLM(config).eval()
    modules = [layer.self_attn for layer in model.model.layers]
    assert all(uses_interface(module) for module in modules)
    calls, insides = [], []

    def observe(call):
        calls.append(call)
        return call.run()

    def watch(call):
        return call.run_watched({Side.PATTERN: lambda tensor: insides.append(tensor) or tensor})

    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        with observed(dict.fromkeys(modules, observe)):
            assert isinstance(vars(modules[0])["config"], ObservedConfig)
            assert torch.equal(model(IDS, use_cache=False).logits, expected)
        assert len(calls) == 2
        _, pattern = calls[0].inside()
        assert int((pattern[:, :, -1] > 0).sum(-1).max()) == 3
        with observed(dict.fromkeys(modules, watch)):
            torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(insides[0], pattern)
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert modules[0].config is model.config


def test_an_observed_name_is_the_name_to_all_but_the_registry():
    model = build("llama", attn_implementation="sdpa")
    module = model.model.layers[0].self_attn
    with observed({module: lambda call: call.run()}):
        name = module.config._attn_implementation
        assert name == "sdpa"
        assert name in ("eager", "sdpa")
        assert not name.startswith("paged")
        assert repr(name) == "'clearspan: sdpa'"
        assert ALL_ATTENTION_FUNCTIONS[name] is not ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert type(str(name)) is str
        assert pickle.loads(pickle.dumps(module.config))._attn_implementation == "sdpa"
        # A change of the setting while somebody observes takes effect, and stays observed.
        model.set_attn_implementation("eager")
        assert module.config._attn_implementation == "eager"
        assert isinstance(module.config._attn_implementation, ObservedName)
    assert type(module.config._attn_implementation) is str


def test_a_change_of_the_implementation_while_hooks_are_on_is_observed():
    bridge, seen = clearspan.boot(build("llama", attn_implementation="sdpa")), []
    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_rot_q", lambda v, hook: seen.append(1))]), torch.no_grad():
        bridge(IDS)
        bridge.hf_model.set_attn_implementation("eager")
        logits = bridge(IDS)
    assert len(seen) == 2
    assert torch.equal(bridge(IDS).detach(), logits)


def test_plain_forwards_of_other_threads_are_plain_while_a_layer_is_observed():
    bridge = clearspan.boot(asking(build("llama", attn_implementation="eager")))
    with torch.no_grad():
        expected = bridge.hf_model(IDS, use_cache=False).logits
    found, hook_calls = [], []

    def plain():
        with torch.no_grad():
            found.extend(bridge.hf_model(IDS, use_cache=False).logits for _ in range(5))

    def listen(value, hook):
        hook_calls.append(1)
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()

    with torch.no_grad():
        logits = bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_pre", listen), SEEN])
    assert torch.equal(logits, expected)
    assert len(found) == 5
    assert all(torch.equal(one, expected) for one in found)
    assert hook_calls == [1]


SEEN = ("blocks.0.attn.hook_rot_q", lambda value, hook: None)
CHANGES_THE_KERNEL = ("hook_attn_scores", "hook_pattern")


def unaltered(bridge, **given):
    """Yields what changes the logits, of listening to and keeping every point but scores and pattern."""
    expected = bridge(IDS, **given)
    names = [name for name in bridge.hook_dict if not name.endswith(CHANGES_THE_KERNEL)]
    for name in names:
        if not torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=[(name, lambda v, hook: None)], **given), expected):
            yield f"listening to {name}"
        if not torch.equal(bridge.run_with_cache(IDS, name, **given)[0], expected):
            yield f"keeping {name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((one, torch.float32) for one in MODELS), *((one, torch.bfloat16) for one in [*MODELS][::6])],
)
def test_reading_a_point_leaves_every_bit_as_it_is(variant, dtype):
    bridge = clearspan.boot(build(variant).to(dtype))
    with torch.no_grad():
        assert not list(unaltered(bridge))
        assert not list(unaltered(bridge, attention_mask=PADDED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [name for name in MODELS if "falcon" in name])
def test_falcon_keeps_its_kernel_while_queries_and_keys_are_read(variant, dtype):
    bridge, seen = clearspan.boot(build(variant).to(dtype)), []
    names = [f"blocks.1.attn.hook_{name}" for name in ("rot_q", "rot_k", "q", "k", "v", "z")]
    hooks = [(name, lambda value, hook: seen.append(hook.name)) for name in names if name in bridge.hook_dict]
    with torch.no_grad():
        for given in ({}, {"attention_mask": PADDED}):
            expected = bridge(IDS, **given)
            assert torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=hooks, **given), expected)
            assert torch.equal(bridge.run_with_cache(IDS, [name for name, _ in hooks], **given)[0], expected)
            if "blocks.1.attn.hook_rot_q" in bridge.hook_dict:
                double = [("blocks.1.attn.hook_rot_q", lambda value, hook: value * 2)]
                assert not torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=double, **given), expected)
    assert set(seen) == {name for name, _ in hooks}


@pytest.mark.parametrize("variant", ["bloom", "gpt2 upcast", "mpt", "falcon"])
def test_operands_are_seen_in_every_way_of_multiplying_them(variant):
    """Before the softmax alone: the pattern and the values are no queries and keys."""
    bridge, seen = clearspan.boot(build(variant)), {}

    def watch(call):
        return call.run_watched({side: lambda one, side=side: seen.setdefault(side, one) for side in SIDES})

    with torch.no_grad(), observed({bridge.blocks[1].attn.module: watch}):
        bridge(IDS)
    d_head = bridge.cfg.d_head
    assert [seen[side].shape[-2:] for side in SIDES] == [(9, d_head), (9, d_head)]


SIDES = (Side.QUERY, Side.KEY)
