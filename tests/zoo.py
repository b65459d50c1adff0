"""Tiny random models of every supported architecture, built in the process."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def _family(name: str, model: str | None = None) -> Callable[..., PreTrainedModel]:
    def build(**settings: Any) -> PreTrainedModel:
        config = getattr(transformers, f"{name}Config")(**{**IDS, **settings})
        return getattr(transformers, model or f"{name}ForCausalLM")(config)

    return build


_LATENT = {
    **SIZES,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "qk_nope_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_FALCON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "alibi": False,
}
_GPT = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}
_MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}

WITHOUT_VARIANT = {"Gemma3nForCausalLM", "Gemma3nForConditionalGeneration", "ZayaForCausalLM"}
"""Architectures of which no variant is among `MODELS`, because their residual is several streams, or their attention is
not linear maps: `tests/parity/test_streams.py` and `tests/unit/architectures/test_zaya.py` have what holds of them."""
MODELS: dict[str, tuple[Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "gpt_bigcode": (_family("GPTBigCode"), _GPT),
    "gpt_bigcode multi-head": (_family("GPTBigCode"), {**_GPT, "multi_query": False}),
    "gpt2": (_family("GPT2", "GPT2LMHeadModel"), _GPT),
    "gpt2 upcast": (
        _family("GPT2", "GPT2LMHeadModel"),
        {
            **_GPT,
            "reorder_and_upcast_attn": True,
            "scale_attn_by_inverse_layer_idx": True,
            "attn_implementation": "eager",
        },
    ),
    "llama": (_family("Llama"), GROUPED),
    "llama biases": (_family("Llama"), {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama eager": (_family("Llama"), {**GROUPED, "attn_implementation": "eager"}),
    "mistral": (_family("Mistral"), {**GROUPED, "sliding_window": 4}),
    "qwen2": (_family("Qwen2"), GROUPED),
    "qwen3": (_family("Qwen3"), {**GROUPED, "head_dim": 16}),
    "gemma2": (
        _family("Gemma2"),
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            # So it is by default, except in transformers 5.20, whose sdpa leaves the cap out.
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        _family("Gemma3Text", model="Gemma3ForCausalLM"),
        {**GROUPED, "head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "phi3": (_family("Phi3"), {**GROUPED, "sliding_window": 5}),
    "gpt_neox": (_family("GPTNeoX"), SIZES),
    "gpt_neox sequential": (_family("GPTNeoX"), {**SIZES, "use_parallel_residual": False}),
    "gptj": (_family("GPTJ"), {**_GPT, "rotary_dim": 4}),
    "opt": (_family("OPT"), {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "opt post-norm": (
        _family("OPT"),
        {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "bloom": (_family("Bloom"), {"vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 4}),
    "bloom normed residual": (
        _family("Bloom"),
        {
            "vocab_size": 97,
            "hidden_size": 48,
            "n_layer": 3,
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "falcon": (_family("Falcon"), {**_FALCON, "bias": True}),
    "falcon sequential": (_family("Falcon"), {**_FALCON, "parallel_attn": False, "multi_query": False}),
    "falcon grouped": (_family("Falcon"), {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon one norm": (
        _family("Falcon"),
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon alibi": (_family("Falcon"), {**_FALCON, "alibi": True, "parallel_attn": False, "multi_query": False}),
    "mpt": (_family("Mpt"), {"vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "olmo2": (_family("Olmo2"), GROUPED),
    "mixtral": (_family("Mixtral"), {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (_family("Qwen3Moe"), {**_MOE, "mlp_only_layers": [1]}),
    "gpt_oss": (
        _family("GptOss"),
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "granite": (
        _family("Granite"),
        {
            **GROUPED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "cohere2": (_family("Cohere2"), {**GROUPED, "sliding_window": 4, "sliding_window_pattern": 2, "logit_scale": 0.5}),
    "deepseek_v3": (_family("DeepseekV3"), _LATENT),
    "deepseek_v3 full queries": (_family("DeepseekV3"), {**_LATENT, "q_lora_rank": None}),
}
"""Each variant's builder and settings."""


CONTINUOUS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts_per_tok": 4},
    "qwen3_moe": {"num_experts_per_tok": 4},
    "gpt_oss": {"num_experts_per_tok": 4},
    "deepseek_v3": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
    "deepseek_v3 full queries": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
}
"""Settings under which every expert is chosen, so that no small change chooses another one."""


def build(variant: str, **changes: Any) -> PreTrainedModel:
    """Returns a model with weights, biases and norms all random, and large enough that every path matters."""
    family, own = MODELS[variant]
    settings = {**own, **changes}
    model = family(**settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.25 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model
