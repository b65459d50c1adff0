"""Tiny models with mixers of every kind, each with the mixer as an adapter describes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from clearspan.architectures import mixers
from clearspan.components import Binding, MixerBridge, hook_points
from clearspan.config import TransformerBridgeConfig
from clearspan.hf.taps import Taps
from clearspan.points import HookPoint

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
HEADS = {"heads": 4, "d_head": 16, "groups": 2, "state": 8}
DELTA = {"heads": 4, "qk_heads": 2, "d_head_qk": 8, "d_head_v": 6}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 2, "num_local_experts": 2}
"""Each token is given to both: no small change makes a router choose another."""


@dataclass(frozen=True)
class Case:
    """One type of model.

    Attributes:
        model_type: Its name in transformers.
        block: Path of a block with a mixer.
        mixer: The mixer, as an adapter describes it.
        config: Entries of its config that differ from `SIZES`.
        padding: Whether the model itself sees to padding on the left.
        cached: Whether it decodes with a KV cache given as `past_key_values` or `cache_params`.
    """

    model_type: str
    block: str
    mixer: Callable[[], MixerBridge]
    config: Mapping[str, Any] = field(default_factory=dict)
    padding: bool = True
    cached: bool = True

    def model(self) -> nn.Module:
        """Returns the model, with random weights large enough to matter."""

        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **{**SIZES, **self.config})
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        return model


def _qwen(name: str, **more: str) -> Callable[[], MixerBridge]:
    return lambda: mixers.gated_delta(name, **DELTA, submodules={"out_proj": "out_proj", "norm": "norm", **more})


_OLMO = {
    **{key: f"{key}_proj" for key in ("q", "k", "v", "a", "b")},
    "z": "g_proj",
    "out_proj": "o_proj",
    "norm": "o_norm",
}
_QWEN35 = {"qkv": "in_proj_qkv", "z": "in_proj_z", "a": "in_proj_a", "b": "in_proj_b"}
_TYPES = {"layer_types": ["linear_attention", "full_attention"]}
_KIMI = {
    "num_key_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 2,
    **EXPERTS,
}

CASES = (
    Case(
        "mamba2",
        "backbone.layers.0",
        lambda: mixers.state_space_heads("mixer", **HEADS),
        {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "expand": 2, "chunk_size": 8},
    ),
    Case(
        "bamba",
        "model.layers.0",
        lambda: mixers.state_space_heads("mamba", **HEADS),
        {**MAMBA2, "attn_layer_indices": [1]},
    ),
    Case(
        "falcon_h1",
        "model.layers.0",
        lambda: mixers.state_space_heads("mamba", **HEADS, gate_scale=0.5, norm=None),
        {**MAMBA2, "mamba_rms_norm": False, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.8], "head_dim": 8},
    ),
    Case(
        "granitemoehybrid",
        "model.layers.0",
        lambda: mixers.state_space_heads("mamba", **HEADS),
        {**MAMBA2, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    Case(
        "nemotron_h",
        "model.layers.0",
        lambda: mixers.state_space_heads("mixer", **HEADS),
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "expand": 2,
            "head_dim": 8,
        },
    ),
    Case(
        "zamba2",
        "model.layers.0",
        lambda: mixers.state_space_heads("mamba", **HEADS),
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_expand": 2,
            "mamba_ngroups": 2,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "adapter_rank": 4,
            "num_mem_blocks": 1,
            "num_key_value_heads": 4,
        },
    ),
    Case(
        "mamba",
        "backbone.layers.0",
        lambda: mixers.selective_scan("mixer", d_inner=64, state=8),
        {"state_size": 8, "intermediate_size": 64, "time_step_rank": 4},
    ),
    Case(
        "falcon_mamba",
        "backbone.layers.0",
        lambda: mixers.selective_scan("mixer", d_inner=64, state=8, has_norms=True),
        {"state_size": 8, "intermediate_size": 64, "time_step_rank": 4},
    ),
    Case(
        "jamba",
        "model.layers.0",
        lambda: mixers.selective_scan("mamba", d_inner=64, state=8, has_norms=True),
        {
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    Case(
        "zamba",
        "model.layers.0",
        lambda: mixers.selective_scan_by_head("mamba", d_inner=64),
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_expand": 2,
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_key_value_heads": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    Case(
        "qwen3_next",
        "model.layers.0",
        _qwen("linear_attn", qkvz="in_proj_qkvz", ba="in_proj_ba"),
        {**LINEAR, **EXPERTS, **_TYPES, "shared_expert_intermediate_size": 16, "head_dim": 8},
    ),
    Case("qwen3_5_text", "model.layers.0", _qwen("linear_attn", **_QWEN35), {**LINEAR, **_TYPES, "head_dim": 8}),
    Case(
        "qwen3_5_moe_text",
        "model.layers.0",
        _qwen("linear_attn", **_QWEN35),
        {**LINEAR, **_TYPES, **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16},
    ),
    Case(
        "qwen4_exp_text",
        "model.layers.0",
        _qwen("linear_attn", **_QWEN35),
        {**LINEAR, **EXPERTS, "layer_types": ["linear_attention"] * 2, "shared_expert_intermediate_size": 16},
        padding=False,
        cached=False,
    ),
    Case("olmo_hybrid", "model.layers.0", _qwen("linear_attn", **_OLMO), {**LINEAR, **_TYPES}),
    Case(
        "kimi_linear",
        "model.layers.0",
        lambda: mixers.channel_delta(
            "self_attn",
            heads=4,
            d_head=8,
            gate=["g_a_proj", "g_b_proj"],
            decay=["forget_gate.f_a_proj", "forget_gate.f_b_proj"],
        ),
        {**_KIMI, **_TYPES},
    ),
    Case(
        "bailing_hybrid",
        "model.layers.0",
        lambda: mixers.channel_delta("self_attn", heads=4, d_head=8, gate=["g_proj"], decay=["forget_gate.f_proj"]),
        {**_KIMI, **_TYPES},
    ),
    Case(
        "lfm2",
        "model.layers.0",
        lambda: mixers.short_conv("conv", d_inner=32),
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8},
    ),
    Case(
        "lfm2_moe",
        "model.layers.0",
        lambda: mixers.short_conv("conv", d_inner=32),
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, **EXPERTS},
    ),
    Case(
        "lfm3",
        "model.layers.0",
        lambda: mixers.short_conv("conv", d_inner=32),
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, **EXPERTS},
    ),
    Case(
        "recurrent_gemma",
        "model.layers.0",
        lambda: mixers.gated_recurrence("temporal_block", d_inner=32),
        {"lru_width": 32, "block_types": ["recurrent", "attention"], "head_dim": 8, "attention_window_size": 16},
        padding=False,
        cached=False,
    ),
    Case(
        "rwkv",
        "rwkv.blocks.0",
        lambda: mixers.weighted_average("attention", d_inner=32),
        {"attention_hidden_size": 32, "context_length": 64},
        padding=False,
        cached=False,
    ),
    Case(
        "xlstm",
        "backbone.blocks.0",
        lambda: mixers.matrix_memory("mlstm_layer", heads=4, d_head_qk=4, d_head_v=8),
        {"num_heads": 4, "num_blocks": 2, "chunk_size": 8, "mode": "inference"},
        padding=False,
        cached=False,
    ),
    Case(
        "minimax",
        "model.layers.0",
        lambda: mixers.lightning("self_attn", heads=4, d_head=8),
        {**_TYPES, **EXPERTS, "head_dim": 8, "block_size": 4},
    ),
)
CASES = tuple(case for case in CASES if case.model_type in CONFIG_MAPPING)  # a release may not have them all
BY_TYPE = {case.model_type: case for case in CASES}


class Live:
    """A tiny model whose first mixer is live, with its hook points and taps.

    Attributes:
        model: The Hugging Face model.
        mixer: The mixer.
        points: Its hook points by their last name.
        taps: The taps.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = case.model()
        cfg = TransformerBridgeConfig(d_model=32, n_heads=4, n_layers=2, n_ctx=64, d_vocab=99)
        self.mixer = case.mixer().bind(Binding(self.model, cfg, lambda: cfg, {}), "blocks.0.mixer", case.block)
        found = hook_points([self.mixer])
        self.points: dict[str, HookPoint] = {
            name.removeprefix("blocks.0.mixer."): point for name, point in found.items() if name.count(".") == 3
        }
        self.taps = Taps(self.model, found.values())

    def __call__(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Returns the model's logits."""
        return self.model(tokens, **{"use_cache": False, **kwargs}).logits

    def values(self, *names: str, tokens: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Returns the values of some points in a run; of all by default."""
        found: dict[str, torch.Tensor] = {}
        listeners = [
            (self.points[name], self.points[name].add_hook(_keeping(found, name))) for name in names or self.points
        ]
        try:
            self(tokens, **kwargs)
        finally:
            for point, listener in listeners:
                point.remove(listener)
        return found


def _keeping(found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def keep(value: torch.Tensor, hook: HookPoint) -> None:
        found[name] = value.detach().clone()

    return keep
