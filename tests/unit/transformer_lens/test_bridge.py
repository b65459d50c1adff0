"""Names of TransformerLens's bridge do what plain torch and transformers do."""

import copy

import pytest
import torch
from tests.hybrids import hybrid
from tests.zoo import build
from torch.nn import functional

import clearspan
from clearspan.errors import (
    InputError,
    InvalidArgumentError,
    MissingPartError,
    MissingWeightError,
    UnknownArgumentError,
    UnknownPointError,
)
from clearspan.weights import FactoredMatrix

POINT = "blocks.1.hook_resid_post"


def nothing(value, hook):
    pass


# --- the model -------------------------------------------------------------------------------------------------------


def test_sums_and_parts_are_the_models(bridge):
    model = bridge.hf_model
    assert bridge.original_model is model
    assert bridge.n_params_total == sum(one.numel() for one in model.parameters())
    assert list(bridge.modules()) == list(model.modules())
    assert [name for name, _ in bridge.named_modules()] == [name for name, _ in model.named_modules()]
    assert [one.shape for one in bridge.buffers()] == [one.shape for _, one in bridge.named_buffers()]
    assert bridge.mod_dict["blocks.1.attn"] is bridge.blocks[1].attn
    assert bridge.mod_dict[POINT] is bridge.hook_dict[POINT]


def test_training_is_the_models(bridge):
    bridge = copy.deepcopy(bridge)
    assert not bridge.training
    assert bridge.train().training


def test_moving_and_casting_act_on_the_model(bridge):
    bridge = copy.deepcopy(bridge)
    for name, dtype in {"double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}.items():
        assert getattr(bridge, name)() is bridge
        assert bridge.hf_model.dtype == dtype == bridge.cfg.dtype
    assert bridge.float().cpu().cuda("cpu").hf_model.dtype == torch.float32
    assert bridge.to("cpu", torch.float64).hf_model.dtype == torch.float64
    assert bridge.to(device="cpu", dtype=torch.float32).hf_model.dtype == torch.float32
    for given in ({}, {"where": "cpu", "device": "cpu"}, {"where": torch.float16, "dtype": torch.float16}):
        with pytest.raises(InvalidArgumentError, match="one device, or one dtype, or one of each"):
            bridge.to(**given)
    assert bridge.close() is None
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgumentError, match="device='cuda:3'"):
            bridge.cuda(3)


# --- layers and heads ------------------------------------------------------------------------------------------------


def test_labels_and_layers_of_heads(bridge):
    labels = [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    assert bridge.all_head_labels == bridge.attn_head_labels == labels
    mixed = hybrid("nemotron_h")
    assert mixed.composition_layer_indices() == mixed.layers_with("attn")
    assert mixed.attn_head_labels == [
        f"L{layer}H{head}" for layer in mixed.layers_with("attn") for head in range(mixed.cfg.n_heads)
    ]
    assert len(mixed.all_head_labels) == mixed.cfg.n_layers * mixed.cfg.n_heads > len(mixed.attn_head_labels)


def test_circuits_of_the_layers_with_attention():
    mixed = hybrid("nemotron_h")
    layers, qk = mixed.QK_for_attn_layers()
    _, ov = mixed.OV_for_attn_layers()
    assert isinstance(qk, FactoredMatrix)
    assert layers == mixed.layers_with("attn") != list(range(mixed.cfg.n_layers))
    attn = mixed.blocks[layers[0]].attn
    keys, values = (mixed.expand_kv_heads(one) for one in (attn.W_K, attn.W_V))
    assert torch.allclose(qk.AB[0], attn.W_Q @ keys.mT, atol=1e-6)
    assert torch.allclose(ov.AB[0], values @ attn.W_O, atol=1e-6)


def test_blocks_and_their_parts(bridge):
    assert bridge.blocks_with("ln2") == list(enumerate(bridge.blocks))
    assert bridge.blocks_with("mixer") == []
    assert bridge.block_submodules(2) == ["ln1", "attn", "ln2", "mlp"]
    names = bridge.block_hooks(2)
    assert names == sorted(names)
    assert {f"blocks.2.{name}" for name in names} == {name for name in bridge.hook_dict if name.startswith("blocks.2.")}
    with pytest.raises(InvalidArgumentError, match="layer_idx=3 is no layer\n  expected: 0 to 2"):
        bridge.block_hooks(3)


def test_parameters_of_a_part_are_stacked(bridge):
    layers, stacked = bridge.stack_params_for("attn", "attn.b_O", lambda bias: bias * 2)
    own = [block.attn.c_proj.bias * 2 for block in bridge.hf_model.transformer.h]
    assert layers == [0, 1, 2]
    assert torch.equal(stacked, torch.stack(own))
    with pytest.raises(InvalidArgumentError, match="no layer has 'mixer'"):
        bridge.stack_params_for("mixer", "mixer.out_proj")


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp_input", [False, True])
@pytest.mark.parametrize("include_mlp_biases", [False, True])
def test_biases_add_up(mlp_input, include_mlp_biases, bridge):
    blocks = bridge.hf_model.transformer.h
    expected = torch.zeros(48)
    for block in blocks[:2]:
        expected = expected + block.attn.c_proj.bias + block.mlp.c_proj.bias * include_mlp_biases
    expected = expected + blocks[2].attn.c_proj.bias * mlp_input
    assert torch.allclose(bridge.accumulated_bias(2, mlp_input, include_mlp_biases), expected, atol=1e-6)


def test_biases_are_what_a_stream_of_nothing_else_gets(bridge):
    bridge = copy.deepcopy(bridge)
    with torch.no_grad():
        bridge.W_O[:], bridge.W_out[:] = 0, 0
    _, cache = bridge.run_with_cache(torch.tensor([[1, 2]]))
    added = cache["resid_post", 2] - cache["resid_pre", 0]
    assert torch.allclose(bridge.accumulated_bias(3).expand_as(added), added, atol=1e-5)


def test_biases_that_are_not_there_or_depend_on_the_input():
    assert not clearspan.boot(build("llama")).accumulated_bias(2).any()
    granite = clearspan.boot(build("granite", attention_bias=True, residual_multiplier=0.5))
    with torch.no_grad():
        granite.b_O[:] = 1
    assert torch.equal(granite.accumulated_bias(2), torch.ones(48))
    gemma = clearspan.boot(build("gemma2", attention_bias=True))
    with pytest.raises(MissingWeightError, match=r"goes through the norm blocks\.0\.ln1_post"):
        gemma.accumulated_bias(2)
    with pytest.raises(InvalidArgumentError, match="layer=3 is no layer\n  expected: 0 to 2"):
        gemma.accumulated_bias(3, mlp_input=True)


def test_directions_of_tokens_are_columns_of_the_unembedding(embedded):
    weight = embedded.hf_model.lm_head.weight
    for given in (7, torch.tensor(7), torch.tensor([7])):
        assert torch.equal(embedded.tokens_to_residual_directions(given), weight[7])
    assert torch.equal(embedded.tokens_to_residual_directions(torch.tensor([[7, 8], [9, 7]]))[1, 0], weight[9])
    word = embedded.to_single_token(" os")
    assert torch.equal(embedded.tokens_to_residual_directions(" os"), weight[word])
    with pytest.raises(InvalidArgumentError, match="these are no tokens"):
        embedded.tokens_to_residual_directions(10**6)


# --- tokens and losses -----------------------------------------------------------------------------------------------


def test_positions_of_tokens(embedded):
    text = "import os, os"
    row, word = embedded.to_tokens(text)[0].tolist(), embedded.to_single_token(" os")
    assert embedded.get_token_position(" os", text) == row.index(word)
    assert embedded.get_token_position(word, torch.tensor(row), mode="last") == len(row) - 1 - row[::-1].index(word)
    assert embedded.get_token_position(torch.tensor(word), text, prepend_bos=False) == row.index(word) - 1
    with pytest.raises(InputError, match="single_token=' re' does not occur"):
        embedded.get_token_position(" re", text)
    with pytest.raises(InputError, match="an input of 2 rows"):
        embedded.get_token_position(" os", [text, text])


def test_tokens_stay_or_move(embedded):
    assert torch.equal(embedded.to_tokens("import os", move_to_device=False), embedded.to_tokens("import os"))
    with pytest.raises(InvalidArgumentError, match="move_to_device=3"):
        embedded.to_tokens("import os", None, None, 3)


def test_the_tokenizer_is_set(embedded):
    bridge = clearspan.boot(embedded.hf_model)
    tokenizer = copy.deepcopy(embedded.tokenizer)
    bridge.set_tokenizer(tokenizer, default_padding_side="left")
    assert bridge.tokenizer is tokenizer
    assert bridge.to_batch(["import os", "x"]).mask[1, 0] == 0
    bridge.set_tokenizer(None)
    assert bridge.tokenizer is None


def test_the_loss_is_torchs(bridge, tokens):
    logits = bridge(tokens)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    assert torch.allclose(bridge.loss_fn(logits, tokens), expected.mean())
    assert torch.allclose(bridge.loss_fn(logits, tokens, per_token=True), expected.unflatten(0, (2, 6)))
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    masked = torch.cat([expected[:3], expected[6:]]).mean()
    assert torch.allclose(bridge.loss_fn(logits, tokens, mask), masked)
    with pytest.raises(InvalidArgumentError, match=r"expected: logits \[2, 7, 97\]"):
        bridge.loss_fn(logits[:, 1:], tokens)


def test_the_stream_that_enters_the_first_block(embedded):
    model, texts = embedded.hf_model.transformer, ["import os", "x = 1, 2"]
    residual, tokens, positional, mask = embedded.input_to_embed(texts)
    batch = embedded.to_batch(texts)
    assert torch.equal(tokens, batch.tokens)
    assert torch.equal(mask, batch.mask)
    assert positional is None
    longest = model.wte(tokens[1]) + model.wpe(torch.arange(tokens.shape[1]))
    assert torch.allclose(residual[1], longest)
    logits = embedded(residual, start_at_layer=0, attention_mask=mask)
    assert torch.allclose(logits, embedded(texts), atol=1e-4)


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_are_listed_and_taken_off(bridge):
    bridge.add_hook(POINT, nothing)
    bridge.add_hook("blocks.0.hook_in", nothing, "bwd")
    bridge.add_perma_hook("blocks.2.attn.hook_z", nothing)
    everywhere = {"blocks.0.hook_resid_pre": 1, POINT: 1, "blocks.2.attn.hook_z": 1}
    assert {name: len(there) for name, there in bridge.list_hooks().items()} == everywhere
    assert list(bridge.list_hooks(dir="bwd")) == ["blocks.0.hook_resid_pre"]
    assert list(bridge.list_hooks("blocks.0.hook_in")) == ["blocks.0.hook_in"]
    assert list(bridge.list_hooks(lambda name: name.endswith("z"))) == ["blocks.2.attn.hook_z"]
    assert POINT in bridge.list_hooks(including_permanent=False)
    assert "blocks.2.attn.hook_z" not in bridge.list_hooks(including_permanent=False)
    bridge.hook_dict[POINT].ctx["kept"] = 1
    bridge.remove_all_hook_fns("fwd")
    assert list(bridge.list_hooks()) == ["blocks.0.hook_resid_pre", "blocks.2.attn.hook_z"]
    bridge.remove_all_hook_fns(including_permanent=True)
    assert bridge.list_hooks() == {}
    assert bridge.hook_dict[POINT].ctx == {"kept": 1}
    bridge.clear_contexts()
    assert bridge.hook_dict[POINT].ctx == {}
    with pytest.raises(InvalidArgumentError, match="level=1: hooks have no levels"):
        bridge.remove_all_hook_fns(level=1)


def test_hook_points_are_found(bridge):
    assert [point.name for point in bridge.hook_points()] == [point.name for point in bridge.index]
    assert bridge.get_hook_point("blocks.0.hook_in") is bridge.hook_dict["blocks.0.hook_resid_pre"]
    assert bridge.get_hook_point("nonsense") is None
    bridge.check_hooks_to_add(bridge.hook_dict[POINT], POINT, nothing)
    with pytest.raises(UnknownPointError, match="nonsense"):
        bridge.check_hooks_to_add(None, "nonsense", nothing)


def test_a_hook_that_is_prepended_comes_first(bridge, tokens):
    order = []
    for name, prepend in (("first", False), ("second", True)):
        bridge.add_hook(POINT, lambda value, hook, name=name: order.append(name), prepend=prepend)
    bridge(tokens)
    bridge.reset_hooks()
    assert order == ["second", "first"]


def test_caching_hooks_keep_what_a_cache_keeps(bridge, tokens):
    loss, expected = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    kept, forward, backward = bridge.get_caching_hooks(incl_bwd=True)
    with bridge.hooks(forward, backward):
        bridge(tokens, return_type="loss").backward()
    assert {name for name in kept if not name.endswith("_grad")} == {name for name in expected if "_grad" not in name}
    for name in (POINT, f"{POINT}_grad", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_q_grad", "hook_logits_grad"):
        assert torch.allclose(kept[name], expected[name], atol=1e-6), name
        assert not kept[name].requires_grad
    assert torch.isfinite(loss)


def test_caching_hooks_stay_until_they_are_taken_off(bridge, tokens):
    own = {}
    kept = bridge.add_caching_hooks(lambda name: name == "blocks.1.hook_out", remove_batch_dim=True, cache=own)
    bridge(tokens[:1])
    assert kept is own
    assert kept["blocks.1.hook_out"].shape == (7, 48)
    bridge(tokens)
    assert kept["blocks.1.hook_out"].shape == (2, 7, 48)
    bridge.reset_hooks()
    kept.clear()
    bridge(tokens)
    assert not kept
    with pytest.raises(UnknownPointError):
        bridge.add_caching_hooks(["blocks.1.hook_out", "nonsense"])
    assert not bridge.list_hooks()


def test_switches_do_nothing(bridge, tokens):
    before = bridge(tokens)
    for name in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in"):
        assert getattr(bridge, f"set_use_{name}")(True) is None
        assert getattr(bridge.cfg, f"use_{name}")
        with pytest.raises(InvalidArgumentError, match=f"use_{name}=3"):
            getattr(bridge, f"set_use_{name}")(3)
    assert torch.equal(bridge(tokens), before)
    assert not bridge.compatibility_mode


@pytest.mark.parametrize(
    ("keyword", "fix"),
    [
        ("return_cache_object", "dict\\(cache\\)"),
        ("reset_hooks_end", "bridge.reset_hooks\\(\\)"),
        ("shortformer_pos_embed", "hf_model"),
    ],
)
def test_keywords_that_runs_do_not_take_say_what_to_do(keyword, fix, bridge, tokens):
    with pytest.raises(UnknownArgumentError, match=f"the bridge does not take '{keyword}'\n  fix: .*{fix}"):
        bridge.run_with_cache(tokens, **{keyword: False})


def test_a_mixer_has_no_circuits_of_heads():
    with pytest.raises((MissingPartError, MissingWeightError)):
        hybrid("mamba").QK_for_attn_layers()
