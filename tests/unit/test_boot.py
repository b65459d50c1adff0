"""Booting, and what a bridge says of its model."""

import io
import json

import pytest
import torch
from tests.conftest import tiny_model
from tests.zoo import build

import clearspan
from clearspan import TransformerBridge
from clearspan.errors import CheckpointError, CheckpointNotFoundError


def test_the_embedded_model(embedded):
    assert isinstance(embedded, TransformerBridge)
    assert (embedded.cfg.n_layers, embedded.cfg.d_model, embedded.cfg.n_heads, embedded.cfg.n_key_value_heads) == (
        5,
        256,
        8,
        1,
    )
    assert embedded.cfg.dtype == next(embedded.hf_model.parameters()).dtype == torch.float32
    assert not embedded.hf_model.training
    assert embedded.hf_model.lm_head.weight is embedded.hf_model.transformer.wte.weight
    assert "tiny-bigcode: 5 layers" in repr(embedded)


def test_a_folder(tmp_path, tokens):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    bridge = clearspan.boot(str(tmp_path))
    assert bridge.tokenizer is None
    assert torch.equal(bridge(tokens), model(tokens, use_cache=False).logits)
    assert clearspan.boot(tmp_path, dtype=torch.float64)(tokens).dtype == torch.float64
    eager = clearspan.boot(tmp_path, attn_implementation="eager")
    assert eager.hf_model.config._attn_implementation == "eager"


OLD = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 48,
    "n_head": 4,
    "n_inner": 80,
    "n_layer": 3,
    "n_positions": 64,
    "summary_type": "cls_index",
    "transformers_version": "4.5.1",
    "vocab_size": 97,
}
"""A config as the first releases of transformers wrote it, with ids that this vocabulary does not have."""


def old_checkpoint(folder, model, without=(), prefix="transformer."):
    """Writes a checkpoint as the first releases did: one pickled file with masks in it, and no tokenizer."""
    (folder / "config.json").write_text(json.dumps({key: value for key, value in OLD.items() if key not in without}))
    weights = {name.replace("transformer.", prefix, 1): value for name, value in model.state_dict().items()}
    for layer in range(3):
        weights[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("without", "prefix"),
    [
        ((), "transformer."),
        (("architectures",), "transformer."),
        ((), ""),  # the model without its unembedding
        (("model_type",), "transformer."),
    ],
)
def test_a_folder_that_an_old_release_wrote(tmp_path, without, prefix):
    model = build("gpt2", n_inner=80)
    old_checkpoint(tmp_path, model, without, prefix)
    bridge = clearspan.boot(tmp_path)
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(bridge(tokens), model(tokens, use_cache=False).logits)
    assert bridge.cfg.model_name == str(tmp_path)
    assert bridge.verify().passed


@pytest.mark.parametrize("architectures", [None, ["TheirOwnModel"]])
def test_a_folder_that_says_no_model_type(tmp_path, architectures):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "n_layer": 3}))
    with pytest.raises(CheckpointNotFoundError) as error:
        clearspan.boot(tmp_path)
    assert str(error.value) == (
        f"cannot load {str(tmp_path)!r}\n"
        "  expected: a hub id, a checkpoint's folder, or one of the embedded models: tiny-bigcode\n"
        f"  reason: Unrecognized model in {tmp_path}. Should have a `model_type` key in its config.json."
    )


def test_the_code_of_a_checkpoint_does_not_run_unasked(tmp_path, monkeypatch):
    auto_map = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    imports = "from pathlib import Path\nfrom transformers import PretrainedConfig, PreTrainedModel\n"
    classes = "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    classes += "class OwnModel(PreTrainedModel):\n    config_class = OwnConfig\n"
    (tmp_path / "code.py").write_text(f"{imports}Path({str(ran)!r}).touch()\n{classes}")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    with pytest.raises(CheckpointNotFoundError) as error:
        clearspan.boot(tmp_path)
    assert str(error.value).endswith("fix: boot(..., trust_remote_code=True), once you have read its code")
    assert not ran.exists()
    with pytest.raises(CheckpointError):  # there are no weights
        clearspan.boot(tmp_path, trust_remote_code=True)
    assert ran.exists()


def test_a_loaded_model_keeps_its_mode():
    model = tiny_model().train()
    assert clearspan.boot(model).hf_model is model
    assert model.training


def test_dtype_and_device_of_a_loaded_model():
    bridge = clearspan.boot(tiny_model(), dtype=torch.bfloat16, device="cpu")
    assert bridge.W_E.dtype == bridge.cfg.dtype == torch.bfloat16
    assert bridge.device == torch.device("cpu")


@pytest.mark.parametrize(("multi_query", "kv_heads"), [(True, 1), (False, 4)])
def test_sizes(multi_query, kv_heads):
    cfg = clearspan.boot(tiny_model(multi_query=multi_query, layer_norm_epsilon=1e-3, n_inner=100)).cfg
    assert (cfg.d_model, cfg.n_heads, cfg.d_head, cfg.n_layers) == (48, 4, 12, 3)
    assert (cfg.n_ctx, cfg.d_vocab, cfg.d_mlp, cfg.eps) == (32, 97, 100, 1e-3)
    assert (cfg.n_key_value_heads, cfg.act_fn, cfg.architecture) == (
        kv_heads,
        "gelu_pytorch_tanh",
        "GPTBigCodeForCausalLM",
    )


def test_methods_of_a_module(bridge, tokens):
    assert bridge.train().hf_model.training
    assert not bridge.eval().hf_model.training
    assert not any(parameter.requires_grad for parameter in bridge.requires_grad_(False).parameters())
    assert bridge.requires_grad_().to(torch.float64) is bridge
    assert bridge.cfg.dtype == bridge(tokens).dtype == torch.float64
    bridge(tokens, return_type="loss").backward()
    assert all(parameter.grad is not None for _, parameter in bridge.named_parameters())
    bridge.zero_grad()
    assert all(parameter.grad is None for parameter in bridge.parameters())


def test_points_outside_components_are_attributes_of_the_bridge(bridge):
    for name in ("hook_embed", "hook_pos_embed", "hook_logits"):
        assert getattr(bridge, name) is bridge.hook_dict[name]


def test_two_bridges_on_one_model(tokens):
    model = tiny_model()
    one, two = clearspan.boot(model), clearspan.boot(model)
    calls = []
    with one.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: calls.append("one"))]):
        two.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: calls.append("two"))])
    assert sorted(calls) == ["one", "two"]


def test_public_names():
    assert clearspan.TransformerBridge.__module__ == "clearspan"
    assert {"boot", "TransformerBridge", "ActivationCache", "get_act_name"} <= set(dir(clearspan))
    with pytest.raises(AttributeError, match="has no attribute 'bot'"):
        clearspan.bot  # noqa: B018
