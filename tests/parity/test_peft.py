"""Models with adapters of peft: at every point and weight they are the merged model, and nothing of them is written."""

import contextlib
import copy
import json
import re
import sys

import peft
import pytest
import torch
from tests.adapted import adapted, all_linear, merged, randomise
from tests.parity.test_changed_models import weights
from tests.zoo import MODELS, build

import clearspan
from clearspan.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    EditedEntryError,
    InvalidArgumentError,
    UnknownArgumentError,
    UnreadableWeightError,
    UnwritableError,
)
from clearspan.interventions import Zero
from clearspan.sweep import LogitDifference, Sweep, grid
from clearspan.sweep.experiment import fingerprint

# peft warns of its own settings: of patterns for experts that are no adapter's, of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

TOKENS = torch.tensor([[5, 9, 2, 40, 7, 11, 3]])
QUICK = ["llama", "gpt2", "bloom", "mixtral", "deepseek_v3"]
POINTS, WEIGHTS = 1e-5, 1e-6
"""Relative; measured at most 2.3e-6 and 1.5e-7 on all architectures."""


def slowly(variants):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in variants]


def relative(one, other):
    return float((one - other).detach().abs().max() / other.abs().max().clamp_min(1e-30))


def assert_equal(bridge, reference):
    """Asserts that two bridges show the same at every point, and have the same weights."""
    logits, cache = bridge.run_with_cache(TOKENS)
    expected, other = reference.run_with_cache(TOKENS)
    assert relative(logits, expected) < POINTS
    assert list(cache) == list(other)
    for name in other:
        assert relative(cache[name].float(), other[name].float()) < POINTS, name
    assert_same_weights(bridge, reference)


def assert_same_weights(bridge, reference):
    mine, others = weights(bridge), weights(reference)
    assert mine.keys() == others.keys()
    for name, weight in others.items():
        if isinstance(weight, str):
            assert isinstance(mine[name], str), name
        else:
            assert mine[name].dtype == weight.dtype
            assert relative(mine[name], weight) < WEIGHTS, name


def with_two(variant="llama"):
    """Returns a model with two adapters, the first active."""
    model = adapted(variant)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    randomise(model, 7)
    model.set_adapter("default")
    return model.eval()


@pytest.mark.parametrize("variant", slowly(MODELS))
def test_lora_on_every_linear_map_is_the_merged_model(variant):
    model = adapted(variant)
    kept = copy.deepcopy(model.state_dict())
    plain = model(TOKENS, use_cache=False).logits
    bridge, reference = clearspan.boot(model), clearspan.boot(merged(model))
    assert bridge.hf_model is model.base_model.model
    assert_equal(bridge, reference)
    raw = [point.name for point in bridge.index if not point.place.side.is_inside]
    with bridge.hooks([(name, lambda value, hook: None) for name in raw]):
        assert torch.equal(model(TOKENS, use_cache=False).logits, plain)
        assert torch.equal(bridge(TOKENS), plain)
    assert torch.equal(bridge.run_with_cache(TOKENS, raw)[0], plain)
    own, others = bridge.processed(fold_value_biases=None), reference.processed(fold_value_biases=None)
    assert own.processing == others.processing
    assert_equal(own, others)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert kept.keys() == model.state_dict().keys()


@pytest.mark.parametrize("variant", slowly(MODELS))
def test_verification(variant):
    found = clearspan.boot(adapted(variant)).verify()
    assert found.passed, str(found)


MAPS = {"llama": ["q_proj", "v_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
PARTS = {"llama": ("embed_tokens", "input_layernorm"), "gpt2": ("wte", "ln_1")}


def kinds(variant):
    """Returns configs of every kind of adapter that changes weights."""
    maps, (embed, norm) = MAPS[variant], PARTS[variant]
    is_conv = variant == "gpt2"

    def lora(targets=maps, **settings):
        return peft.LoraConfig(target_modules=targets, fan_in_fan_out=is_conv and targets == maps, **settings)

    some = {
        "rslora": lora(use_rslora=True, lora_alpha=16),
        "dora": lora(use_dora=True),
        "copies": lora(modules_to_save=["lm_head", "mlp", norm]),
        "tokens": lora(trainable_token_indices=[5, 9]),
        "parameters": lora([], target_parameters=["self_attn.q_proj.weight" if not is_conv else "attn.c_attn.weight"]),
        "norms": peft.LNTuningConfig(target_modules=[norm], task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(target_modules=maps, feedforward_modules=maps[-1:], fan_in_fan_out=is_conv),
        "vera": peft.VeraConfig(target_modules=maps[:1], fan_in_fan_out=is_conv),
        "fourier": peft.FourierFTConfig(target_modules=maps, n_frequency=50, fan_in_fan_out=is_conv),
    }
    if is_conv:
        return {**some, "biases": lora(lora_bias=True)}
    return {
        **some,
        "loha": peft.LoHaConfig(target_modules=maps),
        "lokr": peft.LoKrConfig(target_modules=maps),
        "adalora": peft.AdaLoraConfig(target_modules=maps, total_step=100),
        "oft": peft.OFTConfig(target_modules=maps, oft_block_size=8),
        "boft": peft.BOFTConfig(target_modules=maps, boft_block_size=4),
        "hra": peft.HRAConfig(target_modules=maps),
        "road": peft.RoadConfig(target_modules=maps, group_size=4),
        "miss": peft.MissConfig(target_modules=maps, r=4),
        "delora": peft.DeloraConfig(target_modules=maps),
        "embeddings": lora([*maps, embed, "lm_head"]),
        "dora of embeddings": lora([embed], use_dora=True),
    }


QUICK_KINDS = {("llama", "dora"), ("llama", "copies"), ("llama", "ia3"), ("gpt2", "rslora"), ("gpt2", "tokens")}
KINDS = [
    pytest.param(variant, kind, marks=[] if (variant, kind) in QUICK_KINDS else pytest.mark.slow)
    for variant in MAPS
    for kind in kinds(variant)
]


@pytest.mark.filterwarnings("ignore")  # peft warns of its own settings
@pytest.mark.parametrize(("variant", "kind"), KINDS)
def test_every_kind_of_adapter_is_its_merged_model(variant, kind):
    model = adapted(variant, kinds(variant)[kind])
    bridge, reference = clearspan.boot(model), clearspan.boot(merged(model))
    assert_equal(bridge, reference)
    assert bridge.verify().passed
    own = bridge.processed()
    assert_same_weights(own, reference.processed())
    plain = bridge(TOKENS).log_softmax(-1)
    assert relative(own(TOKENS).log_softmax(-1), plain) < POINTS


def test_an_adapter_on_one_of_tied_embeddings():
    # Merged by peft, it would be in the other one too.
    bridge = clearspan.boot(adapted("gpt2", peft.LoraConfig(target_modules=["wte"])))
    base = bridge.hf_model.lm_head.weight
    assert torch.equal(bridge.W_U, base.T)
    assert relative(bridge.W_E, base) > 0.1
    assert torch.equal(bridge.W_E[TOKENS], bridge.run_with_cache(TOKENS)[1]["hook_embed"])
    assert bridge.tied == {"W_E": ("W_U",), "W_U": ("W_E",)}
    with torch.no_grad(), pytest.raises(UnwritableError, match="embed is made of a base weight and an adapter"):
        bridge.W_E[3] = 0
    own = bridge.processed()
    assert not own.tied
    assert relative(own(TOKENS).log_softmax(-1), bridge(TOKENS).log_softmax(-1)) < POINTS
    assert bridge.verify().passed


@pytest.mark.parametrize("variant", ["gemma3", "gemma2"])
def test_an_adapter_on_an_embedding_that_is_multiplied(variant):
    model = adapted(variant, peft.LoraConfig(target_modules=["embed_tokens"]), tie_word_embeddings=False)
    bridge, reference = clearspan.boot(model), clearspan.boot(merged(model))
    assert_equal(bridge, reference)


# --- which adapters act ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def chosen(model, *names):
    before = model.base_model.active_adapters
    model.base_model.set_adapter(list(names))
    yield
    model.base_model.set_adapter(before)


@contextlib.contextmanager
def put_in(model):
    model.merge_adapter()
    yield
    model.unmerge_adapter()


STATES = {
    "one": (lambda model: contextlib.nullcontext(), ["default"]),
    "other": (lambda model: chosen(model, "second"), ["second"]),
    "both": (lambda model: chosen(model, "default", "second"), ["default", "second"]),
    "off": (lambda model: model.disable_adapter(), []),
    "merged": (put_in, ["default"]),
}


@pytest.mark.parametrize("variant", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_points_and_weights_are_of_the_adapters_that_act_now(variant):
    model = with_two(variant)
    bridge = clearspan.boot(model)
    references = {
        name: clearspan.boot(merged(model, names) if names else copy.deepcopy(model).unload())
        for name, (_, names) in STATES.items()
    }
    seen = []
    bridge.add_hook("blocks.1.attn.hook_q", lambda value, hook: seen.append(value))
    before = fingerprint(bridge.hf_model)
    for name, (state, _) in [*STATES.items(), *STATES.items()]:
        with state(model):
            assert_equal(bridge, references[name])
            assert torch.equal(seen[-1], bridge.run_with_cache(TOKENS, "blocks.1.attn.hook_q")[1]["q", 1])
            assert_same_weights(
                bridge.processed(fold_value_biases=None), references[name].processed(fold_value_biases=None)
            )
            assert (fingerprint(bridge.hf_model) == before) == (name == "one")
        if name == "merged":
            before = fingerprint(bridge.hf_model)  # it is not taken out again to the last bit
    assert seen


@pytest.mark.parametrize("variant", ["llama", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_the_inside_of_attention_that_an_adapter_holds_a_copy_of(variant):
    config = peft.LoraConfig(target_modules=["lm_head"], modules_to_save=["self_attn"])
    model = adapted(variant, config)
    bridge, reference = clearspan.boot(model), clearspan.boot(merged(model))
    assert_equal(bridge, reference)
    assert bridge.verify().passed
    seen = []
    bridge.add_hook("blocks.1.attn.hook_pattern", lambda value, hook: seen.append(value.clone()))
    bridge.add_hook("blocks.1.attn.hook_q", lambda value, hook: seen.append(value.clone()))
    names = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_pattern"]
    plain = clearspan.boot(build(variant))
    for _ in range(2):
        for state, other in ((contextlib.nullcontext(), reference), (model.disable_adapter(), plain)):
            seen.clear()
            with state:
                bridge(TOKENS)
            for value, name in zip(seen, names, strict=True):
                assert relative(value, other.run_with_cache(TOKENS, name)[1][name]) < POINTS
    bridge.reset_hooks()
    assert not any(part._forward_hooks or "forward" in vars(part) for part in model.modules())
    assert type(model.base_model.model.model.layers[1].self_attn.original_module.config) is type(model.config)


def test_an_adapter_on_positions_that_are_no_plain_table():
    bridge = clearspan.boot(adapted("opt", peft.LoraConfig(target_modules=["embed_positions"])))
    with pytest.raises(UnreadableWeightError, match="a OPTLearnedPositionalEmbedding does more than to look its input"):
        _ = bridge.W_pos


def test_a_weight_that_no_adapter_changes_is_live():
    model = with_two()
    attn = clearspan.boot(model).blocks[0].attn
    with model.disable_adapter(), torch.no_grad():
        attn.W_O = attn.W_O * 2
        attn.W_Q[1] = 0
    assert not attn.q.module.base_layer.weight[12:24].any()
    assert attn.W_Q[1].any()  # of the adapter alone


def test_writes_into_a_sum_are_refused():
    bridge = clearspan.boot(adapted("llama"))
    attn, mlp = bridge.blocks[0].attn, bridge.blocks[1].mlp
    writes = {
        "blocks.0.attn.q": lambda: attn.W_Q.__setitem__(0, 0),
        "blocks.0.attn.o": lambda: setattr(attn, "W_O", attn.W_O * 2),
        "blocks.1.mlp.out": lambda: mlp.W_out[3].zero_(),
        "blocks.0.attn.k": lambda: bridge.W_K.mul_(2),
    }
    before = copy.deepcopy(bridge.hf_model.state_dict())
    for part, write in writes.items():
        with torch.no_grad(), pytest.raises(UnwritableError) as error:
            write()
        assert str(error.value).startswith(
            f"the weight of {part} is made of a base weight and an adapter, and what was read is a copy\n"
            "  where: Linear at model.layers."
        )
        assert "fix: peft_model.merge_and_unload(), and boot what it returns; or write the parameters" in str(
            error.value
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in bridge.hf_model.state_dict().items())


def test_reading_a_weight_calls_no_hook_of_the_users_and_draws_no_random_number():
    model = adapted("llama", peft.LoraConfig(target_modules=["o_proj"], use_dora=True))
    for part in model.modules():
        part.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state = torch.get_rng_state()
    _ = clearspan.boot(model).W_O
    assert torch.equal(torch.get_rng_state(), state)


def test_biases_that_an_adapter_changes():
    model = adapted("llama biases", peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    bridge, reference = clearspan.boot(model), clearspan.boot(merged(model))
    assert relative(bridge.b_Q, reference.b_Q) < WEIGHTS
    assert relative(bridge.b_Q[0], bridge.blocks[0].attn.q.module.base_layer.bias.view(4, 20)) > 0.01
    with torch.no_grad(), pytest.raises(UnwritableError, match="made of a base weight and an adapter"):
        bridge.blocks[0].attn.b_Q = torch.zeros(4, 20)


# --- weights that are no sum -----------------------------------------------------------------------------------------


def assert_points_alone(bridge, part, reason):
    with pytest.raises(UnreadableWeightError) as error:
        _ = bridge.W_O
    text = str(error.value)
    assert text.startswith(
        f"the weight of {part} cannot be told\n  where: Linear of Linear, active adapters: 'default'\n"
    )
    assert f"  reason: {reason}\n" in text
    assert "  fix: points that need no weight; or peft_model.merge_and_unload(), and boot what it returns" in text
    with pytest.raises(UnreadableWeightError, match="cannot be told"):
        bridge.processed()
    _, cache = bridge.run_with_cache(TOKENS)
    assert cache["attn_out", 0].isfinite().all()
    with pytest.raises(UnreadableWeightError, match="cannot be told"):
        _ = cache["result", 0]


def test_an_adapter_that_drops_values_has_no_weight():
    bridge = clearspan.boot(adapted("llama", peft.LoraConfig(target_modules=["o_proj"], lora_dropout=0.1)))
    assert bridge.W_O.shape == (3, 4, 12, 48)
    bridge.train()
    assert_points_alone(
        bridge, "blocks.0.attn.o", "the adapter drops values at random in training mode; bridge.eval() ends it"
    )


def test_an_adapter_with_a_bias_where_the_base_has_none():
    bridge = clearspan.boot(adapted("llama", peft.LoraConfig(target_modules=["o_proj"], lora_bias=True)))
    assert_points_alone(bridge, "blocks.0.attn.o", "the adapter adds a bias to a base layer that has none")
    found = bridge.verify()
    assert found.passed, str(found)
    assert "could not be checked" in str(found)


class Bent(peft.tuners.lora.Linear):
    """A tuner that is no linear map."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) + 0.1 * super().forward(x.relu(), *args, **kwargs)


def test_an_adapter_that_is_no_linear_map():
    model = adapted("llama", peft.LoraConfig(target_modules=["o_proj"]))
    for layer in model.base_model.model.model.layers:
        layer.self_attn.o_proj.__class__ = Bent
    bridge = clearspan.boot(model)
    with pytest.raises(UnreadableWeightError) as error:
        _ = bridge.W_O
    assert str(error.value) == (
        "the weight of blocks.0.attn.o cannot be told\n"
        "  where: Bent of Linear, active adapters: 'default'\n"
        "  reason: what the module does is not the product of its input with one weight\n"
        "  fix: points that need no weight; or peft_model.merge_and_unload(), and boot what it returns"
    )
    found = bridge.verify()
    assert found.passed, str(found)


def test_a_merged_adapter_that_is_disabled():
    model = adapted("llama")
    model.merge_adapter()
    bridge = clearspan.boot(model)
    with model.disable_adapter():
        with pytest.raises(UnreadableWeightError, match="a merged adapter is disabled, and the next forward takes"):
            _ = bridge.W_O
        bridge(TOKENS)
        assert torch.equal(bridge.blocks[0].attn.o.matrix, bridge.blocks[0].attn.o.module.base_layer.weight)


# --- caches ----------------------------------------------------------------------------------------------------------


def stepped(model):
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.o_proj.lora_B["default"].weight.mul_(1.5)


CHANGES = {
    "step": stepped,
    "set_adapter": lambda model: model.set_adapter("second"),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scaled": lambda model: model.base_model.model.model.layers[1].self_attn.o_proj.scale_layer(2.0),
    "unloaded": lambda model: model.unload(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_cache_computes_with_other_adapters_is_refused(change):
    model = with_two()
    bridge = clearspan.boot(model)
    _, cache = bridge.run_with_cache(TOKENS)
    expected = cache["result", 1].sum(2)
    assert relative(expected, cache["attn_out", 1]) < POINTS
    CHANGES[change](model)
    with pytest.raises(EditedEntryError, match=r"blocks.1.attn.hook_result is computed with weights that are not"):
        _ = cache["result", 1]
    _, again = bridge.run_with_cache(TOKENS)
    assert relative(again["result", 1].sum(2), again["attn_out", 1]) < POINTS


def test_a_cache_of_before_the_adapter_was_there():
    model = build("llama")
    bridge = clearspan.boot(model)
    _, cache = bridge.run_with_cache(TOKENS)
    peft.get_peft_model(model, all_linear(model, init_lora_weights=False))
    with pytest.raises(EditedEntryError):
        _ = cache["result", 1]
    assert_equal(bridge, clearspan.boot(merged_in_place(model)))


def merged_in_place(model):
    """Returns a plain copy of a model that has adapters in place."""
    return clearspan.boot(copy.deepcopy(model)).processed(
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    ).hf_model  # fmt: skip


def test_a_cache_in_a_file(tmp_path):
    model = with_two()
    bridge = clearspan.boot(model)
    _, cache = bridge.run_with_cache(TOKENS)
    expected = cache["result", 1]
    cache.save(tmp_path / "run.safetensors")
    read = clearspan.ActivationCache.load(tmp_path / "run.safetensors", bridge)
    assert torch.equal(read["result", 1], expected)
    model.set_adapter("second")
    with pytest.raises(EditedEntryError):
        _ = read["result", 1]
    read = clearspan.ActivationCache.load(tmp_path / "run.safetensors", bridge)
    with pytest.raises(EditedEntryError):
        _ = read["result", 1]


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("variant", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_adapters_get_their_gradients_with_hooks_on(variant):
    model = adapted(variant)
    bridge = clearspan.boot(model)
    expected = gradients(model, model(TOKENS, use_cache=False).logits.square().mean())
    names = ["hook_resid_mid", "attn.hook_q", "attn.hook_result", "hook_q_input"]
    edits = [(f"blocks.1.{name}", lambda value, hook: value * 1.0) for name in names]
    with bridge.hooks(edits):
        own = gradients(model, bridge(TOKENS).square().mean())
    assert own.keys() == expected.keys()
    assert any("lora_A" in name for name in own)
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_a_sum_is_on_the_graph_of_its_adapter(settings):
    model = adapted("llama", peft.LoraConfig(target_modules=["o_proj"], **settings))
    own = gradients(model, clearspan.boot(model).blocks[1].attn.W_O.square().sum())
    assert {name.split(".o_proj.")[1].split(".")[0] for name in own} >= {"lora_A", "lora_B"}
    assert all(gradient.any() for gradient in own.values())


# --- other runs ------------------------------------------------------------------------------------------------------


def test_other_runs_equal_those_of_the_merged_model():
    model = adapted("llama")
    bridge, reference = clearspan.boot(model), clearspan.boot(merged(model))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(bridge.generate(TOKENS, **settings), reference.generate(TOKENS, **settings))
    assert str(bridge.plan_cache(TOKENS.shape)) == str(reference.plan_cache(TOKENS.shape))
    cells = grid("z", Zero(), layer=range(3), head=range(4))
    sums, expected = (
        Sweep(one, TOKENS, cells, LogitDifference(3, 4)).run(progress=False).values for one in (bridge, reference)
    )
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
    for start in (1, 2):
        stream = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(start))
        torch.testing.assert_close(
            bridge(stream, start_at_layer=start), reference(stream, start_at_layer=start), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(bridge.OV.AB, reference.OV.AB, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the library says at import what it cannot use on this machine
def test_lora_on_a_quantised_base():
    import bitsandbytes  # noqa: PLC0415 (it takes long, and warns)

    model = build("llama")
    for path, part in list(model.named_modules()):
        if path.endswith("_proj"):
            new = bitsandbytes.nn.Linear4bit(part.in_features, part.out_features, bias=False, quant_type="nf4")
            new.load_state_dict(part.state_dict())
            new.support_avx512bf16_for_cpu = False  # it would repack the weights, and give no values of them
            model.set_submodule(path, new.to("cpu"))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    bridge = clearspan.boot(model.eval())
    assert bridge.verify().passed
    _, cache = bridge.run_with_cache(TOKENS)
    assert relative(cache["result", 1].sum(2), cache["attn_out", 1]) < 1e-3
    with pytest.raises(UnreadableWeightError, match="a quantised model cannot be processed"):
        bridge.processed()


def test_half_precision_below_an_adapter_in_full():
    model = build("llama").to(torch.bfloat16)
    model = peft.get_peft_model(model, all_linear(model))  # peft holds adapters in float32
    randomise(model)
    bridge, reference = clearspan.boot(model.eval()), clearspan.boot(merged(model))
    for name in ("W_Q", "W_out"):
        assert getattr(bridge, name).dtype == torch.bfloat16
        torch.testing.assert_close(getattr(bridge, name), getattr(reference, name), rtol=1e-2, atol=1e-2)
    assert bridge.verify().passed


# --- what boot takes -------------------------------------------------------------------------------------------------


def test_boot_of_the_parts_of_a_model_of_peft():
    model = adapted("gpt2")
    for one in (model, model.base_model.model, model.get_base_model()):
        assert clearspan.boot(one).hf_model is model.base_model.model
    bridge = clearspan.boot(model)
    plain = bridge(TOKENS)
    bridge.add_hook("blocks.1.hook_resid_post", lambda value, hook: value * 0)
    assert not torch.equal(model(TOKENS, use_cache=False).logits, plain)
    clearspan.unhook(model)
    assert torch.equal(model(TOKENS, use_cache=False).logits, plain)
    mixed = peft.PeftMixedModel(build("llama"), peft.LoraConfig(target_modules=["q_proj"]), "a")
    mixed.add_adapter("b", peft.LoHaConfig(target_modules=["v_proj", "q_proj"], init_weights=False))
    mixed.set_adapter(["a", "b"])
    randomise(mixed)
    bridge, reference = clearspan.boot(mixed.eval()), clearspan.boot(copy.deepcopy(mixed).merge_and_unload())
    assert_equal(bridge, reference)


def test_adapters_that_transformers_itself_adds():
    model = build("llama")
    model.add_adapter(all_linear(model, init_lora_weights=False))
    bridge = clearspan.boot(model.eval())
    assert_equal(bridge, clearspan.boot(merged_in_place(model)))
    assert bridge.verify().passed


PROMPTS = {
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
}
_ELSEWHERE = "fix: clearspan.boot(base_model), which is the model without what the adapter does there"


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_are_refused(kind):
    config = PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.boot(model)
    assert str(error.value) == (
        f"an adapter of the kind {kind} cannot be booted\n"
        "  expected: adapters that change weights, such as LoRA\n"
        "  where: PeftModelForCausalLM\n"
        "  reason: it gives the forward a learned prompt, which no weight of the model holds\n"
        f"  {_ELSEWHERE}"
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.PolyConfig(target_modules=["q_proj"], n_tasks=2), "it has a forward of its own"),
        (lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2), "it has a forward of its own"),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 9]),
            "it acts from certain tokens on, which only its own forward looks for",
        ),
    ],
)
def test_adapters_that_change_the_forward_are_refused(config, reason):
    config = config()
    config.task_type = "CAUSAL_LM"
    with pytest.raises(
        InvalidArgumentError, match=f"cannot be booted\n(.*\n)*  reason: {reason}\n  {re.escape(_ELSEWHERE)}"
    ):
        clearspan.boot(peft.get_peft_model(build("llama"), config))


def test_mixed_batches_are_refused():
    bridge = clearspan.boot(adapted("llama"))
    with pytest.raises(UnknownArgumentError, match="adapter_names"):
        bridge(TOKENS, adapter_names=["default"])


@pytest.fixture
def folder(tmp_path):
    """A folder with an adapter, and one with its base model."""
    build("llama").save_pretrained(tmp_path / "base")
    model = type(build("llama")).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, all_linear(model))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_folder_with_an_adapter(folder):
    path, model = folder
    bridge = clearspan.boot(path)
    plain = model(TOKENS, use_cache=False).logits
    assert torch.equal(bridge(TOKENS), plain)
    assert not bridge.hf_model.training
    assert not any(parameter.requires_grad for name, parameter in bridge.named_parameters() if "lora_" in name)
    assert relative(bridge.W_Q, clearspan.boot(merged(model)).W_Q) < WEIGHTS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dora", "copies", "tokens", "ia3", "norms", "adalora", "embeddings"])
def test_folders_with_other_adapters(tmp_path, kind):
    build("llama").save_pretrained(tmp_path / "base")
    model = type(build("llama")).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, kinds("llama")[kind])
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    plain = model.get_base_model()(TOKENS, use_cache=False).logits
    assert torch.equal(clearspan.boot(tmp_path / "adapter")(TOKENS), plain)


@pytest.mark.parametrize("variant", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_folder_with_an_adapter_of_experts(tmp_path, variant):
    build(variant).save_pretrained(tmp_path / "base")
    model = type(build(variant)).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, all_linear(model))
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    assert torch.equal(clearspan.boot(tmp_path / "adapter")(TOKENS), model(TOKENS, use_cache=False).logits)


def test_a_folder_without_a_base_model(folder):
    path, _ = folder
    change(path, base_model_name_or_path=None)
    with pytest.raises(
        CheckpointNotFoundError,
        match=r"is an adapter, and does not say of which model\n  expected: base_model_name_or_path in adapter_config"
        r".json\n  fix: clearspan.boot\(peft.PeftModel.from_pretrained\(base_model, folder\)\)",
    ):
        clearspan.boot(path)
    change(path, base_model_name_or_path="./nowhere")
    with pytest.raises(
        CheckpointNotFoundError, match=r"cannot load './nowhere', the base model of the adapter in '.*'\n  re"
    ):
        clearspan.boot(path)


def wrong(path, variant, **changes):
    build(variant, **changes).save_pretrained(path.parent / "other")
    change(path, base_model_name_or_path=str(path.parent / "other"))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: wrong(path, "gpt2"), "Target modules .* not found in the base model"),
        (lambda path: wrong(path, "llama", hidden_size=64), "size mismatch for .*lora_A"),
        (
            lambda path: wrong(path, "llama", num_hidden_layers=4),
            r"got: .*layers\.3\..* and 11 more\n  reason: only",
        ),
        (
            lambda path: wrong(path, "llama", num_hidden_layers=2),
            r"got: .*layers\.2\..* and 11 more\n  reason: only",
        ),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"123"), "header too small"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "reason: .*adapter"),
    ],
    ids=["architecture", "width", "more layers", "fewer layers", "damaged", "no weights"],
)
def test_a_folder_with_an_adapter_that_does_not_fit(folder, spoil, text):
    path, _ = folder
    spoil(path)
    start = r"the adapter in '.*' cannot be put into its base model\n  expected: whole weights of .*\n(.*\n)*.*"
    with pytest.raises(CheckpointError, match=start + text):
        clearspan.boot(path)


def test_a_folder_with_an_adapter_that_cannot_be_loaded(folder, monkeypatch):
    path, _ = folder
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r"is an adapter, and loading one takes peft\n  reason: .*\n  fix: pip"):
        clearspan.boot(path)
    monkeypatch.undo()
    change(path, peft_type="PREFIX_TUNING")
    with pytest.raises(InvalidArgumentError, match="an adapter of the kind PREFIX_TUNING cannot be booted"):
        clearspan.boot(path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read adapter_config.json in"):
        clearspan.boot(path)
