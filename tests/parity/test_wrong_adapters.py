"""Adapters that leave something of their model out, or say it wrongly: what boot and verify make of them."""

from typing import ClassVar

import pytest
import torch
import transformers
from tests.zoo import GROUPED, IDS, build

import clearspan
from clearspan import TransformerBridge
from clearspan.architectures import ADAPTERS, ArchitectureAdapter, Sizes, parts
from clearspan.architectures.llama import LLAMA_SIZES, LlamaArchitectureAdapter
from clearspan.architectures.mixtures import MixtralArchitectureAdapter
from clearspan.errors import AdapterError, AdapterWarning
from clearspan.hf.loading import bridge_config

GPTJ = ADAPTERS["GPTJForCausalLM"]


class PhiArchitectureAdapter(ArchitectureAdapter):
    """Phi, as it should be."""

    sizes: ClassVar[Sizes] = {**LLAMA_SIZES, "eps": ("layer_norm_eps",)}
    rotary = True

    def mapping(self, cfg):
        blocks = parts.block(
            "model.layers",
            parallel=True,
            ln1=parts.norm("input_layernorm"),
            attn=parts.attention("self_attn", q="q_proj", k="k_proj", v="v_proj", o="dense", rotary=self.rotary),
            mlp=parts.mlp("mlp", in_="fc1", out="fc2"),
        )
        return parts.decoder(embed="model.embed_tokens", blocks=blocks, ln_final=parts.norm("model.final_layernorm"))


class PhiWithoutRotation(PhiArchitectureAdapter):
    """Phi, without a word of its rotation."""

    rotary = False


@pytest.fixture
def phi():
    sizes = {**GROUPED, "hidden_size": 64, "partial_rotary_factor": 0.5}
    return randomised(transformers.PhiForCausalLM(transformers.PhiConfig(**{**IDS, **sizes})))


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def booted(model, adapter) -> TransformerBridge:
    return TransformerBridge(model, adapter(bridge_config(model, adapter)))


def failed(bridge: TransformerBridge) -> list[str]:
    return [f"{check.group}: {check.what}" for check in bridge.verify().failures]


def test_a_right_adapter_of_a_new_family_passes(phi):
    found = booted(phi, PhiArchitectureAdapter).verify()
    assert found.passed, str(found)


def test_a_rotation_that_the_adapter_leaves_out(phi):
    wrong = failed(booted(phi, PhiWithoutRotation))
    assert "attention: queries of blocks.0.attn are not rotated by position" in wrong
    assert any(one.startswith("processing: refactor_factored_attn_matrices") for one in wrong)


def test_norms_of_queries_and_keys_that_the_adapter_leaves_out():
    bridge = booted(build("qwen3"), LlamaArchitectureAdapter)
    wrong = bridge.verify().failures
    unclaimed = next(check for check in wrong if check.what.startswith("model.layers.0.self_attn.q_norm.weight"))
    assert unclaimed.explanation == (
        "No component of the adapter accounts for it, so what it computes is in no point and in no weight, and "
        "processing takes it for absent. The adapter needs a part for it, or an entry in `irrelevant` with the reason."
    )
    assert any(check.what == "queries of blocks.0.attn.hook_q are used in the product" for check in wrong)


def test_a_shared_expert_that_the_adapter_leaves_out():
    sizes = {
        **GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    }
    model = randomised(transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**{**IDS, **sizes})))
    wrong = failed(booted(model, MixtralArchitectureAdapter))
    assert "structure: model.layers.0.mlp.shared_expert.gate_proj.weight is in no component" in wrong
    assert any(one.startswith("identities: blocks.0.mlp.experts.hook_out == blocks.0.mlp.hook_out") for one in wrong)
    assert any(one.startswith("processing: fold_ln") for one in wrong)


class Swapped(GPTJ):
    """GPT-J with queries and keys in each other's place, which no score on the diagonal tells."""

    def mapping(self, cfg):
        mapping = super().mapping(cfg)
        attn = mapping["blocks"].submodules["attn"]
        attn.submodules = {**attn.submodules, "q": attn.submodules["k"], "k": attn.submodules["q"]}
        return mapping


class Sequential(GPTJ):
    """GPT-J with attention before the MLP."""

    def mapping(self, cfg):
        mapping = super().mapping(cfg)
        mapping["blocks"].stages = (("attn",), ("mlp",))
        return mapping


@pytest.mark.parametrize("adapter", [Swapped, Sequential])
def test_wrong_adapters_are_reported_and_raise_nothing(adapter):
    wrong = failed(booted(build("gptj"), adapter))
    assert wrong


class Misplaced(GPTJ):
    """GPT-J with a path that is not there."""

    def mapping(self, cfg):
        return {**super().mapping(cfg), "ln_final": parts.norm("transformer.ln_g")}


class Unmade(GPTJ):
    """GPT-J with a part that it forgot to make."""

    def mapping(self, cfg):
        mapping = super().mapping(cfg)
        blocks = mapping["blocks"]
        blocks.submodules = {key: part for key, part in blocks.submodules.items() if key != "mlp"}
        return mapping


class Failing(GPTJ):
    """GPT-J by an adapter that reads what the config does not have."""

    def mapping(self, cfg):
        return parts.decoder(embed=cfg.hf["no_such_entry"], blocks=super().mapping(cfg)["blocks"])


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            Misplaced,
            [
                "ln_final is not where the adapter says",
                "  expected: a module 'ln_g' in transformer",
                "  got: wte, drop, h, ln_f",
                "  where: GPTJModel",
                "  nearest: ln_f",
                "  fix: the component's name in the adapter",
            ],
        ),
        (
            Unmade,
            [
                "blocks.0 has no part 'mlp'",
                "  expected: 'mlp': MLPBridge",
                "  got: ln1, attn",
                "  fix: the component's submodules in the adapter",
            ],
        ),
        (
            Failing,
            [
                "Failing does not fit GPTJForCausalLM",
                "  reason: KeyError: 'no_such_entry'",
                "  fix: the adapter: CONTRIBUTING.md shows what it says",
            ],
        ),
    ],
)
def test_boot_says_what_is_wrong(monkeypatch, adapter, said):
    monkeypatch.setitem(ADAPTERS, "GPTJForCausalLM", adapter)
    with pytest.raises(AdapterError) as error:
        clearspan.boot(build("gptj"))
    assert str(error.value).splitlines() == said


def test_boot_warns_of_what_is_in_no_component(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "Qwen3ForCausalLM", LlamaArchitectureAdapter)
    with pytest.warns(AdapterWarning) as warned:
        clearspan.boot(build("qwen3"))
    lines = str(warned[0].message).splitlines()
    assert lines[0] == "the adapter does not fit Qwen3ForCausalLM; bridge.verify() says more"
    assert lines[1].startswith("  model.layers.0.self_attn.q_norm.weight is in no component. No component of the")
    assert len(lines) == 6


def test_a_longer_window_is_not_exercised_and_that_is_said():
    bridge = clearspan.boot(build("mistral", sliding_window=50, max_position_embeddings=128))
    found = bridge.verify()
    assert found.passed, str(found)
    text = "lengths past sliding_window=50, a sliding window: the inputs have 12 tokens; verify(tokens=...) with longer"
    assert any(what.startswith(text) for what in found.not_exercised)
    assert f"not exercised: {text}" in str(found)
    longer = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    assert not any("sliding_window" in what for what in bridge.verify(tokens=longer).not_exercised)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral"])
def test_half_precision_is_checked_on_a_copy_in_single_precision(variant):
    bridge = clearspan.boot(build(variant).bfloat16())
    found = bridge.verify()
    assert found.passed, str(found)
    own = [check for check in found.checks if check.group in ("attention", "gradients", "processing")]
    assert own
    assert all(check.tolerance is None or check.tolerance < 0.05 for check in own)
