"""Entries of a model's config that its code reads, and that nothing in its adapter accounts for."""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from clearspan.components import GeneralizedComponent
from clearspan.hf.config_reads import defaults, entries_of_sizes, entries_read, stored_name
from clearspan.hf.loading import text_config
from clearspan.model import Model

SHAPES = "a size or a bias: the parameters have it, and the structure's checks compare them with the adapter"
ATTENTION = "inside attention: hook_rot_q, hook_rot_k, hook_attn_scores and hook_pattern show what comes of it"
CHOICE = "in a mixture's choice of experts: hook_router_logits and hook_expert_weights show what comes of it"
NOT_RUN = "for training, for tasks other than language, or for what is returned: a forward's values do not depend on it"
ACTIVATION = "between hook_pre and hook_post, which show it on both sides"
MIXER = "inside a state-space, convolution or linear-attention mixer, whose points show what comes of it"
ROUNDING = "in what pieces or precision the same is computed"
NORMS = "in norms: their modules have it, and the identities check their scale"

EXPLAINED: Mapping[str, str] = {
    **dict.fromkeys(
        ("*_token_id", "*_token_index", "*dropout*", "*_pdrop", "*_prob", "*initializer*", "*init*", "*_loss*"), NOT_RUN
    ),
    **dict.fromkeys(("output_*", "return_*", "use_cache", "problem_type", "num_labels", "classifier_*"), NOT_RUN),
    **dict.fromkeys(("layerdrop", "*_layerdrop", "summary_*", "*jitter*", "gradient_checkpointing", "seed"), NOT_RUN),
    **dict.fromkeys(("*_config", "dtype", "is_decoder", "is_encoder*", "tie_*", "num_logits_to_keep"), NOT_RUN),
    **dict.fromkeys(("*_size", "*_dim", "*_rank", "*_inner", "*_embd", "*bias", "*_width", "*_channels"), SHAPES),
    **dict.fromkeys(("num_*heads*", "n_head*", "num_*layers*", "n_layer*", "*_positions", "max_*_len*"), SHAPES),
    **dict.fromkeys(("max_position_embeddings", "*_head_dim", "d_*", "*vocab*", "*_dense_replace"), SHAPES),
    **dict.fromkeys(
        ("layer_types", "mlp_layer_types", "mlp_only_layers", "layers_block_type", "hybrid_layer_ids", "*_sparse_step"),
        SHAPES,
    ),
    **dict.fromkeys(("*rope*", "*rotary*", "*sliding_window*", "*window*", "attention_chunk_size", "alibi"), ATTENTION),
    **dict.fromkeys(("*attn*scal*", "scale_attn*", "query_pre_attn_scalar", "attention_multiplier"), ATTENTION),
    **dict.fromkeys(("*attn*softcap*", "reorder_and_upcast_attn", "*softmax_in_fp32", "attn_temperature*"), ATTENTION),
    **dict.fromkeys(("position_*", "relative_*", "index_*", "floor_scale", "qk_norm", "use_qk_norm"), ATTENTION),
    **dict.fromkeys(("causal", "use_bidirectional_attention", "num_buckets", "*block_size"), ATTENTION),
    **dict.fromkeys(("*expert*", "norm_topk_prob", "topk_*", "n_group", "top_k*", "*topk", "scoring_func"), CHOICE),
    **dict.fromkeys(("moe_*", "rout*_scal*", "router_*", "num_expert_group"), CHOICE),
    **dict.fromkeys(("*_act", "*_activation", "activation", "activation_function", "swiglu_*"), ACTIVATION),
    **dict.fromkeys(("mamba_*", "ssm_*", "time_step*", "conv_*", "linear_*", "state_*", "expand", "use_mamba*"), MIXER),
    **dict.fromkeys(("*chunk_size*", "*_chunk_length", "pretraining_tp", "residual_in_fp32"), ROUNDING),
    **dict.fromkeys(("*_eps", "eps", "*_epsilon"), NORMS),
}
"""Entries by patterns of their names that need no word in an adapter, each with the reason."""


def unexplained(model: Model) -> Iterator[str]:
    """Yields what of the config changes the forward in a way that no part of the adapter may express.

    An entry of the model's config is named if the model's code reads it for more than shapes, it differs from its
    class's default, and neither the adapter reads it, nor one of its parts has the value, nor `EXPLAINED` has the name.
    """
    config = text_config(model.hf_model)
    usual, used, values = defaults(config), _used(model), _numbers(model)
    read = {stored_name(config, name) for name, does_more in entries_read(model.hf_model).items() if does_more}
    for name in sorted(read & set(vars(config))):
        value = vars(config)[name]
        known = name in used or any(fnmatch.fnmatchcase(name, pattern) for pattern in EXPLAINED)
        if name.startswith("_") or known or (name in usual and usual[name] == value) or _is_one_of(value, values):
            continue
        yield (
            f"config.{name} is {value!r}, which the model's code reads, and nothing of the adapter speaks of it: "
            "what it does may be in no point"
        )


class _Noted(dict[str, Any]):
    """Entries of a config that note which of them are read."""

    def __init__(self, entries: Mapping[str, Any], noted: set[str]) -> None:
        super().__init__(entries)
        self._noted = noted

    def __getitem__(self, name: str) -> Any:
        self._noted.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns an entry, or the default."""
        self._noted.add(name)
        return super().get(name, default)


def _used(model: Model) -> set[str]:
    """Returns the entries from which sizes come, and those that the adapter reads when it is made."""
    noted: set[str] = set()
    source, config = model.adapter.source, text_config(model.hf_model)
    source(replace(model.cfg, hf=_Noted(model.cfg.hf, noted)))
    return {stored_name(config, name) for name in noted} | entries_of_sizes(model.hf_model, source)


def _numbers(model: Model) -> list[float]:
    """Returns the numbers by which parts multiply, cap or shift."""
    parts: list[GeneralizedComponent] = [part for component in model.components for part in component.walk()]
    found = {value for part in parts for value in vars(part).values() if isinstance(value, float)}
    return [value for value in found if value not in (0.0, 1.0)]


def _is_one_of(value: object, numbers: list[float]) -> bool:
    """Whether a value, or its inverse, is one of these numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return False
    return any(abs(number / wanted - 1) < 1e-6 for number in numbers for wanted in (value, 1 / value))
