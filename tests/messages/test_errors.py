"""What users read when something is wrong: the whole message, and that nothing was lost."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.releases import start_checkpointing, stop_checkpointing
from transformers import DynamicCache, GenerationConfig, T5Config, T5ForConditionalGeneration

import clearspan
from clearspan.errors import (
    AbsentPointError,
    CheckpointNotFoundError,
    ClearspanError,
    CompiledModelError,
    ConflictingWritesError,
    EditedEntryError,
    HookFailedError,
    HookTypeError,
    HookValueError,
    InputError,
    InvalidArgumentError,
    MissingWeightError,
    NotCachedError,
    NoTokenizerError,
    PointNotReachedError,
    TokenRangeError,
    UnknownArgumentError,
    UnknownPointError,
    UnsupportedArchitectureError,
    UnwritableError,
)

Z = "blocks.1.attn.hook_z"


def message(error: pytest.ExceptionInfo[ClearspanError]) -> list[str]:
    return str(error.value).splitlines()


def identity(value, hook):
    return None


def is_clean(model: torch.nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()) and all(
        block.attn.config is model.config for block in model.transformer.h
    )


def test_all_facts_of_an_error():
    error = ClearspanError("what", expected="e", got="g", where="w", nearest=["a", "b"], reason="r", fix="f")
    assert str(error).splitlines() == [
        "what", "  expected: e", "  got: g", "  where: w", "  nearest: a, b", "  reason: r", "  fix: f",
    ]  # fmt: skip


@pytest.mark.parametrize("raised", [StopIteration, StopAsyncIteration, GeneratorExit])
@pytest.mark.parametrize("way", ["forward", "backward", "generate", "stream"])
def test_what_ends_a_loop_is_an_error(way, raised, bridge, tokens):
    def hook(value, hook):
        if hook.step is None or hook.step == 2:
            raise raised

    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "fwd_hooks": [(Z, hook)]}
    with pytest.raises(HookFailedError) as error:
        match way:
            case "forward":
                bridge.run_with_hooks(tokens, [(Z, hook)])
            case "backward":
                bridge.run_with_hooks(tokens, bwd_hooks=[(Z, hook)], return_type="loss").backward()
            case "generate":
                bridge.generate(tokens, **given)
            case "stream":
                list(bridge.generate_stream(tokens, **given))
    assert message(error) == [
        f"a hook function raised {raised.__name__}",
        f"  where: {Z}",
        "  reason: a loop or a stream above would take it for its own end",
        "  fix: return, or raise another error",
    ]
    bridge.zero_grad()
    assert is_clean(bridge.hf_model)


@pytest.mark.parametrize("call", ["run_with_hooks", "run_with_cache", "hooks", "add_hook", "list of names"])
def test_unknown_point(call, bridge, tokens):
    misspelt = "blocks.1.attn.hook_zz"
    with pytest.raises(UnknownPointError) as error:
        match call:
            case "run_with_hooks":
                bridge.run_with_hooks(tokens, fwd_hooks=[(Z, identity), (misspelt, identity)])
            case "run_with_cache":
                bridge.run_with_cache(tokens, misspelt)
            case "list of names":
                bridge.run_with_cache(tokens, [Z, misspelt])
            case "hooks":
                with bridge.hooks(bwd_hooks=[(misspelt, identity)]):
                    pass
            case _:
                bridge.add_hook(misspelt, identity)
    assert message(error) == [
        "no hook point 'blocks.1.attn.hook_zz'",
        "  nearest: blocks.1.attn.hook_z, blocks.2.attn.hook_z, blocks.1.attn.hook_v",
        "  fix: bridge.hook_dict has every name",
    ]
    assert isinstance(error.value, KeyError)
    assert is_clean(bridge.hf_model)


def test_unknown_name_in_the_dictionary_of_hooks(bridge):
    with pytest.raises(UnknownPointError, match="nearest: hook_embed"):
        bridge.hook_dict["hook_embd"]
    with pytest.raises(UnknownPointError, match="get_act_name\\('q', layer\\)"):
        bridge.hook_dict["q"]


def test_layer_that_does_not_exist(bridge, tokens):
    with pytest.raises(UnknownPointError) as error:
        bridge.run_with_cache(tokens, "blocks.7.attn.hook_z")
    assert message(error) == [
        "no hook point 'blocks.7.attn.hook_z'", "  expected: a layer from 0 to 2", "  got: layer 7",
    ]  # fmt: skip


def test_absent_point(bridge, tokens):
    with pytest.raises(AbsentPointError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_rot_q", identity)])
    assert message(error)[::2] == [
        "GPTBigCodeForCausalLM has no hook point 'blocks.1.attn.hook_rot_q'",
        "  reason: no rotary embedding and no query norm: the product reads hook_q as it is",
    ]


def test_predicate_that_holds_for_none(bridge, tokens):
    for call in (
        lambda: bridge.run_with_cache(tokens, lambda name: False),
        lambda: bridge.run_with_hooks(tokens, fwd_hooks=[(lambda name: False, identity)]),
    ):
        with pytest.raises(UnknownPointError) as error:
            call()
        assert message(error) == [
            "the predicate holds for no hook point",
            f"  where: {len(bridge.hook_dict)} names of GPTBigCodeForCausalLM",
            "  fix: try it on the names in bridge.hook_dict",
        ]


@pytest.mark.parametrize("call", ["forward", "run_with_hooks", "run_with_cache"])
def test_unknown_keyword(call, bridge, tokens):
    function = bridge if call == "forward" else getattr(bridge, call)
    with pytest.raises(UnknownArgumentError) as error:
        function(tokens, retrun_type="loss")
    assert message(error)[0] == "unknown keyword 'retrun_type'"
    assert message(error)[2].startswith("  nearest: return_type")
    assert message(error)[1] == (
        "  where: neither TransformerBridge.forward nor GPTBigCodeForCausalLM.forward takes it"
    )
    assert isinstance(error.value, TypeError)


def test_keyword_of_the_models_own_outputs(bridge, tokens):
    with pytest.raises(UnknownArgumentError) as error:
        bridge(tokens, output_attentions=True)
    assert message(error) == [
        "the bridge does not take 'output_attentions'",
        "  fix: bridge.run_with_cache(...) and cache['pattern', layer]",
    ]


def test_wrong_shape(bridge, tokens):
    base = bridge(tokens)
    with pytest.raises(HookValueError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: value[:, :3])])
    assert message(error) == [
        "a hook function returned a value of the wrong shape",
        "  expected: [2, 7, 4, 12] (batch=2, pos=7, head=4, d_head=12)",
        "  got: [2, 3, 4, 12]",
        "  where: blocks.1.attn.hook_z",
    ]
    assert is_clean(bridge.hf_model)
    assert torch.equal(bridge(tokens), base)


def test_wrong_dtype(bridge, tokens):
    with pytest.raises(HookTypeError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: value.double())])
    assert message(error) == [
        "a hook function returned a value of the wrong dtype",
        "  expected: torch.float32",
        "  got: torch.float64",
        "  where: blocks.1.attn.hook_z",
        "  fix: return value.to(torch.float32)",
    ]


def test_wrong_device(bridge, tokens):
    with pytest.raises(HookValueError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: value.to("meta"))])
    assert message(error)[:3] == [
        "a hook function returned a value on the wrong device", "  expected: cpu", "  got: meta",
    ]  # fmt: skip


def test_something_that_is_no_tensor(bridge, tokens):
    with pytest.raises(HookTypeError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[(Z, lambda value, hook: 0.0)])
    assert message(error) == [
        "a hook function returned something that is not a tensor",
        "  expected: a tensor, or None for 'edited in place or only read'",
        "  got: float",
        "  where: blocks.1.attn.hook_z",
    ]


def test_hook_that_is_not_callable(bridge, tokens):
    with pytest.raises(HookTypeError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", identity), (Z, torch.zeros(1))])
    assert message(error)[0] == "a hook function must be callable"
    assert is_clean(bridge.hf_model)


def test_hooks_that_are_no_pairs(bridge, tokens):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[Z])
    assert message(error)[1] == "  expected: pairs (name, function)"


def test_unknown_direction(bridge):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.add_hook(Z, identity, dir="forward")
    assert message(error) == ["unknown direction 'forward'", "  expected: 'fwd' or 'bwd'", f"  where: {Z}"]


def test_compiled_model_is_refused_at_boot():
    with pytest.raises(CompiledModelError) as error:
        clearspan.boot(torch.compile(tiny_model()))
    assert message(error) == [
        "this is the result of torch.compile, and compiled code drops torch hooks quietly",
        "  where: OptimizedModule of GPTBigCodeForCausalLM",
        "  fix: clearspan.boot(compiled._orig_mod)",
    ]


@pytest.mark.parametrize("path", ["", "transformer.h.1", "transformer.h.1.attn.c_proj"])
def test_compiled_module_that_is_listened_to(path, bridge, tokens):
    bridge.hf_model.get_submodule(path).compile(backend="eager")
    for call in (
        lambda: bridge.run_with_hooks(tokens, fwd_hooks=[(Z, identity)]),
        lambda: bridge.run_with_cache(tokens, Z),
    ):
        with pytest.raises(CompiledModelError) as error:
            call()
        name = type(bridge.hf_model.get_submodule(path)).__name__
        assert message(error)[0] == f"{name} is compiled, and compiled code drops torch hooks quietly"
    if path.endswith("c_proj"):
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", identity)])


def test_a_compiled_forward_is_refused_too(bridge, tokens):
    block = bridge.hf_model.transformer.h[1]
    block.forward = torch.compile(block.forward)
    with pytest.raises(CompiledModelError, match="GPTBigCodeBlock is compiled"):
        bridge.run_with_cache(tokens)


@pytest.mark.parametrize(
    "where", ["hook_embed", Z, "blocks.1.attn.hook_pattern", "blocks.1.hook_q_input", "hook_logits"]
)
def test_a_hook_that_raises_leaves_the_model_clean(where, bridge, tokens):
    base = bridge(tokens)

    def fail(value, hook):
        raise RuntimeError("the user's own error")

    changes = [("blocks.0.hook_resid_mid", lambda value, hook: value + 1), (where, fail)]
    with pytest.raises(RuntimeError, match="the user's own error"):
        bridge.run_with_hooks(tokens, fwd_hooks=changes)
    with bridge.hooks(fwd_hooks=changes), pytest.raises(RuntimeError, match="the user's own error"):
        bridge.run_with_cache(tokens)
    assert is_clean(bridge.hf_model)
    assert not bridge.taps._passage.pending
    assert torch.equal(bridge(tokens), base)


T5 = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def test_architecture_without_an_adapter():
    """An encoder and decoder is not derived either."""
    model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    with pytest.raises(UnsupportedArchitectureError) as error:
        clearspan.boot(model)
    assert message(error)[0] == "no adapter for T5ForConditionalGeneration, and its structure was not found"
    assert any(line.startswith("  reason: ") for line in message(error))
    assert message(error)[-1] == (
        "  fix: boot(model, adapter=...) with an adapter of your own: CONTRIBUTING.md shows how, step by step"
    )


def test_saved_architecture_that_is_no_causal_language_model(tmp_path):
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the config is enough to refuse it
    with pytest.raises(UnsupportedArchitectureError, match="no adapter for T5ForConditionalGeneration") as error:
        clearspan.boot(tmp_path)
    assert message(error)[-1] == "  fix: write an adapter: CONTRIBUTING.md shows how, step by step"


def test_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointNotFoundError) as error:
        clearspan.boot(str(tmp_path))
    assert message(error) == [
        f"{str(tmp_path)!r} is a folder, but not a checkpoint",
        "  expected: config.json, weights, and tokenizer files, as save_pretrained writes them; or an adapter of peft",
        "  got: notes.txt",
    ]
    assert isinstance(error.value, FileNotFoundError)


def test_name_that_is_nothing(monkeypatch):
    with pytest.raises(CheckpointNotFoundError) as error:
        clearspan.boot("tiny-bigcoed", local_files_only=True)
    assert message(error)[:2] == [
        "cannot load 'tiny-bigcoed'",
        "  expected: a hub id, a checkpoint's folder, or one of the embedded models: tiny-bigcode",
    ]


def test_object_that_is_no_model():
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.boot(torch.nn.Linear(2, 2))
    assert message(error) == [
        "cannot boot this object",
        "  expected: a hub id, a folder, the name of an embedded model, or a loaded PreTrainedModel",
        "  got: Linear",
    ]


def test_loading_keywords_beside_a_loaded_model():
    with pytest.raises(UnknownArgumentError, match="unknown keywords revision"):
        clearspan.boot(tiny_model(), revision="main")


def test_text_longer_than_the_context(embedded):
    text = "x = 1\n" * 600
    with pytest.raises(InputError) as error:
        embedded(text)
    assert message(error)[:2] == [
        "the input is longer than the model's context", "  expected: at most 512 tokens",
    ]  # fmt: skip
    assert message(error)[3] == "  fix: bridge.to_tokens(text, truncate=True)"
    assert embedded.to_tokens(text, truncate=True).shape == (1, 512)


@pytest.mark.parametrize("empty", ["", ["x", ""], []])
def test_empty_text(empty, embedded):
    for call in (embedded, embedded.to_tokens, embedded.run_with_cache, embedded.generate):
        with pytest.raises(InputError) as error:
            call(empty)
        assert message(error)[0] == ("an empty string has no tokens" if empty != [] else "an empty list has no rows")


def test_ids_outside_the_vocabulary(bridge):
    with pytest.raises(TokenRangeError) as error:
        bridge(torch.tensor([[1, 97, -2]]))
    assert message(error) == ["token ids outside the vocabulary", "  expected: 0 to 96", "  got: -2 to 97"]
    assert isinstance(error.value, IndexError)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.long), "token ids have two axes"),
        (torch.zeros(1, 0, dtype=torch.long), "token ids have two axes"),
        (torch.zeros(2, 3, 5), "a tensor of numbers is taken as embeddings or a residual stream"),
    ],
)
def test_inputs_of_other_shapes(value, expected, bridge):
    with pytest.raises(InputError) as error:
        bridge(value)
    assert message(error)[0] == expected
    assert message(error)[2] == f"  got: {list(value.shape)}"


def test_mask_that_does_not_fit(bridge, tokens):
    with pytest.raises(InputError, match="the attention mask does not fit the input"):
        bridge(tokens, attention_mask=torch.ones(2, 5))


def test_text_without_a_tokenizer(bridge):
    for call in (bridge, bridge.to_tokens, bridge.generate, bridge.to_single_token):
        with pytest.raises(NoTokenizerError) as error:
            call("text")
        assert message(error)[-1] == (
            "  fix: clearspan.boot(model, tokenizer=...), or pass token ids as a tensor [batch, pos]"
        )


def test_write_that_gradient_checkpointing_would_lose(bridge, tokens):
    model = bridge.hf_model.train()
    start_checkpointing(model)
    hooks = [("blocks.1.hook_resid_mid", lambda value, hook: value * 2)]
    with pytest.raises(UnwritableError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss")
    assert message(error) == [
        "this write would be lost",
        "  where: blocks.1.hook_resid_mid",
        "  reason: gradient checkpointing computes the forward again during backward, when these hooks are gone",
        "  fix: with bridge.hooks(fwd_hooks=...): around forward and backward",
    ]
    bridge.run_with_hooks(tokens, fwd_hooks=[(Z, identity)], return_type="loss").backward()
    with pytest.raises(InvalidArgumentError, match="incl_bwd=True does not work under gradient checkpointing"):
        bridge.run_with_cache(tokens, incl_bwd=True)

    for reentrant in (False, True):
        start_checkpointing(model, reentrant=reentrant)
        with bridge.hooks(fwd_hooks=hooks):
            loss = bridge(tokens, return_type="loss")
        with pytest.raises(UnwritableError) as error:
            loss.backward()
        assert message(error)[:2] == [
            "gradients would be wrong: a hook that wrote in the forward is gone",
            "  where: blocks.1.hook_resid_mid",
        ]
    start_checkpointing(model)

    def gradients():
        model.zero_grad()
        with bridge.hooks(fwd_hooks=hooks):
            bridge(tokens, return_type="loss").backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    checkpointed = gradients()
    stop_checkpointing(model)
    for one, other in zip(checkpointed, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_two_writes_of_which_one_would_hide_the_other(bridge, tokens):
    double = lambda value, hook: value * 2  # noqa: E731
    with pytest.raises(ConflictingWritesError) as error:
        bridge.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.hook_q_input", double), ("blocks.1.ln1.hook_normalized", double)]
        )
    assert message(error) == [
        "a head's or projection's own input was written, and what all of them read after the norm as well",
        "  where: blocks.1.attn",
        "  fix: write the inputs alone, or hook_q, hook_k, hook_v, which come after both",
    ]


def test_listening_in_a_part_that_is_not_run(bridge, tokens):
    with pytest.raises(PointNotReachedError) as error:
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_pre", identity)], stop_at_layer=2)
    assert message(error) == [
        "blocks.2.hook_resid_pre is not reached in this run",
        "  where: start_at_layer=None, stop_at_layer=2",
        "  reason: it is in a part of the model that is left out",
        "  fix: take the hook off, or run that part",
    ]
    residual = bridge(tokens, stop_at_layer=1)
    for name in ("hook_embed", "blocks.0.attn.hook_z"):
        with pytest.raises(PointNotReachedError, match=f"{name} is not reached"):
            bridge.run_with_hooks(residual, fwd_hooks=[(name, identity)], start_at_layer=1)
        with pytest.raises(PointNotReachedError, match=f"{name} is not reached"):
            bridge.run_with_cache(residual, name, start_at_layer=1)


def test_a_hook_that_did_not_fire(bridge, tokens):
    with pytest.raises(PointNotReachedError) as error:
        bridge.run_with_hooks(bridge.W_E[tokens], fwd_hooks=[("hook_embed", identity)])
    assert message(error) == [
        "the hook on hook_embed did not fire",
        "  where: output of transformer.wte",
        "  reason: the forward did not pass there in this run",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"stop_at_layer": 9}, "stop_at_layer=9 is no layer"),
        ({"start_at_layer": 1}, "start_at_layer=1 needs the residual stream entering that layer"),
        ({"start_at_layer": 2, "stop_at_layer": 1}, "stop_at_layer=1 comes before start_at_layer=2"),
        ({"return_type": "logit"}, "unknown return_type 'logit'"),
    ],
)
def test_arguments_of_the_wrong_value(arguments, expected, bridge, tokens):
    with pytest.raises(InvalidArgumentError) as error:
        bridge(tokens, **arguments)
    assert message(error)[0] == expected


@pytest.mark.parametrize(
    ("arguments", "got", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2", "the search moves rows from one beam to another"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2", "rows of the cache are rows"),
        ({"prompt_lookup_num_tokens": 1}, "prompt_lookup_num_tokens=1", "it runs tokens that are then thrown away"),
        ({"logits_to_keep": 1}, "logits_to_keep=1", "the cache has the logits of every position"),
        ({"custom_generate": lambda: None}, "function", "it decides itself what the model is run on"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams=4", "the search moves rows"),
    ],
)
def test_generation_that_cannot_be_cached(arguments, got, reason, bridge, tokens):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.generate(tokens, return_cache=True, **arguments)
    lines = message(error)
    assert lines[0].startswith("return_cache=True does not go with ")
    assert lines[1] == f"  got: {got}"
    assert lines[2].startswith(f"  reason: {reason}")
    assert lines[3] == "  fix: generate without a cache, then bridge.run_with_cache(generated[:, :-1])"


def test_generation_that_is_cached_from_the_middle(bridge, tokens):
    past = DynamicCache()
    bridge(tokens[:, :4], past_key_values=past)
    with pytest.raises(InvalidArgumentError) as error:
        bridge.generate(tokens, return_cache=True, past_key_values=past)
    assert message(error) == [
        "return_cache=True starts with an empty KV cache",
        "  got: past_key_values of 4 positions",
        "  reason: positions that do not go through the model would be missing",
    ]


def test_filter_without_a_cache(bridge, tokens):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.generate(tokens, names_filter="hook_embed")
    assert message(error) == [
        "names_filter says what a cache keeps, and no cache was asked for",
        "  got: return_cache=False",
        "  fix: bridge.generate(..., return_cache=True, names_filter=...)",
    ]


def test_stream_that_cannot_be(bridge, tokens):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.generate_stream(tokens, max_tokens_per_yield=0)
    assert message(error) == [
        "a stream gives at least one token at a time",
        "  expected: max_tokens_per_yield of 1 or more",
        "  got: 0",
    ]
    with pytest.raises(InvalidArgumentError) as error:
        bridge.generate_stream(tokens, streamer=object())
    assert message(error) == [
        "generate_stream has a streamer of its own",
        "  got: object",
        "  fix: bridge.generate(..., streamer=...)",
    ]


def test_loss_without_tokens(bridge, tokens):
    with pytest.raises(InvalidArgumentError, match="a loss needs logits and at least two tokens"):
        bridge(bridge.W_E[tokens], return_type="loss")


def test_entries_that_are_not_cached(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens, Z)
    with pytest.raises(NotCachedError) as error:
        cache["q", 1]
    assert message(error) == [
        "blocks.1.attn.hook_q exists, but is not in this cache",
        "  got: 1 entries",
        "  nearest: blocks.1.attn.hook_z",
        "  fix: name it in names_filter",
    ]
    with pytest.raises(NotCachedError) as error:
        cache[Z + "_grad"]
    assert message(error)[-1] == "  fix: run_with_cache(..., incl_bwd=True)"
    with pytest.raises(UnknownPointError, match="no hook point"):
        cache["blocks.1.attn.hook_zz"]
    with pytest.raises(InvalidArgumentError, match="no layer 3"):
        cache["z", 3]


def test_entry_that_was_edited(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    cache["q", 1].zero_()
    for name in ("q", "k", "pattern"):
        with pytest.raises(EditedEntryError) as error:
            cache[name, 1]
        assert message(error) == [
            f"the cache's entry for blocks.1.attn.hook_{name} was written after it was kept",
            "  reason: entries share storage with each other and with what the forward made",
            f"  fix: value = cache['blocks.1.attn.hook_{name}'].clone() before editing in place",
        ]
    assert cache["q", 0].any()
    assert cache["pattern", 0].any()


def test_result_after_the_weights_were_changed(bridge, tokens):
    _, cache = bridge.run_with_cache(tokens)
    result = cache["result", 1]
    with torch.no_grad():
        bridge.blocks[1].attn.W_O.mul_(2)
    with pytest.raises(EditedEntryError) as error:
        cache["result", 1]
    assert message(error) == [
        "blocks.1.attn.hook_result is computed with weights that are not those of the cache's run",
        "  reason: they were changed since, or the cache is from a file of another checkpoint's",
        "  fix: run_with_cache again, or compute it before changing the weights",
    ]
    assert torch.equal(bridge.run_with_cache(tokens)[1]["result", 1], result * 2)


def test_batch_axis_of_several_rows(bridge, tokens):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.run_with_cache(tokens, remove_batch_dim=True)
    assert message(error) == ["cannot leave out the batch axis", "  expected: one row", "  got: 2 rows"]


def test_weight_that_is_not_there():
    model = tiny_model()
    for block in model.transformer.h:
        block.mlp.c_fc.bias = None
    with pytest.raises(MissingWeightError) as error:
        clearspan.boot(model).blocks[0].mlp.b_in  # noqa: B018
    assert message(error) == [
        "blocks.0.mlp.in has no bias",
        "  where: Linear at transformer.h.0.mlp.c_fc",
        "  reason: the model's own module has none, and zeros are not made up",
    ]


def test_template_that_is_called(bridge):
    with pytest.raises(InvalidArgumentError) as error:
        bridge.adapter.component_mapping["ln_final"](torch.zeros(1, 2, 48))
    assert message(error)[1] == "  fix: use the live one, such as bridge.blocks[0].attn"


def test_more_than_one_token(embedded):
    with pytest.raises(InputError, match="is not a single token"):
        embedded.to_single_token("def area(self):")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("q", (), "the point 'q' is in a block"),
        ("scale", (1,), "several norms of a block have 'scale'"),
    ],
)
def test_short_names_that_say_too_little(name, arguments, expected):
    with pytest.raises(InvalidArgumentError) as error:
        clearspan.get_act_name(name, *arguments)
    assert message(error)[0] == expected


def test_layer_of_a_point_in_no_block(bridge):
    with pytest.raises(InvalidArgumentError, match="is in no layer"):
        bridge.hook_dict["hook_embed"].layer()
