"""GPT-2, and the families of its time and make: layer norms, a plain MLP, weights with biases."""

from typing import ClassVar

from clearspan.architectures.base import ArchitectureAdapter
from clearspan.components import (
    ActivationBridge,
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    TransposedLinearBridge,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule, QKVConversionRule
from clearspan.points import Layout


class _LayerNormAdapter(ArchitectureAdapter):
    """What these families share on `cfg`."""

    config_values: ClassVar[dict[str, object]] = {
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "final_rms": False,
        "gated_mlp": False,
        "attn_only": False,
        "uses_rms_norm": False,
        "eps_attr": "layer_norm_epsilon",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        cfg.n_key_value_heads = self._n_kv_heads()

    def _n_kv_heads(self) -> int:
        return self.cfg.n_heads

    def _joint_attention(
        self, name: str, qkv: str, o: str, rule: QKVConversionRule, *, has_rotary: bool = False
    ) -> JointQKVAttentionBridge:
        """Returns attention with one linear map for queries, keys and values."""
        return JointQKVAttentionBridge(
            name=name,
            qkv_conversion_rule=rule,
            has_rotary=has_rotary,
            submodules={"qkv": LinearBridge(name=qkv), "o": LinearBridge(name=o)},
        )

    def _mlp(self, name: str | None, inward: str, outward: str, layout: Layout = Layout.TOKENS) -> MLPBridge:
        """Returns a plain MLP."""
        parts = {"in": LinearBridge(name=inward, layout=layout), "out": LinearBridge(name=outward, layout=layout)}
        return MLPBridge(name=name, submodules=parts)


class GPT2ArchitectureAdapter(_LayerNormAdapter):
    """GPT-2."""

    uses_combined_qkv = True

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        rule = BlockedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads=cfg.n_heads)
        self.component_mapping = {
            "embed": EmbeddingBridge(name="transformer.wte"),
            "pos_embed": PosEmbedBridge(name="transformer.wpe"),
            "blocks": BlockBridge(
                name="transformer.h",
                submodules={
                    "ln1": NormalizationBridge(name="ln_1"),
                    "attn": JointQKVAttentionBridge(
                        name="attn",
                        qkv_conversion_rule=rule,
                        submodules={
                            "qkv": TransposedLinearBridge(name="c_attn"),
                            "o": TransposedLinearBridge(name="c_proj"),
                        },
                    ),
                    "ln2": NormalizationBridge(name="ln_2"),
                    "mlp": MLPBridge(
                        name="mlp",
                        submodules={
                            "in": TransposedLinearBridge(name="c_fc"),
                            "out": TransposedLinearBridge(name="c_proj"),
                        },
                    ),
                },
            ),
            "ln_final": NormalizationBridge(name="transformer.ln_f"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }


class GPTJArchitectureAdapter(_LayerNormAdapter):
    """GPT-J."""

    config_values: ClassVar[dict[str, object]] = {
        **_LayerNormAdapter.config_values,
        "positional_embedding_type": "rotary",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads=cfg.n_heads)
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="transformer.wte"),
            "blocks": BlockBridge(
                name="transformer.h",
                is_parallel=True,
                returns_tuple=True,
                submodules={
                    "ln1": NormalizationBridge(name="ln_1"),
                    "attn": AttentionBridge(
                        name="attn",
                        has_rotary=True,
                        submodules={key: LinearBridge(name=name) for key, name in names.items()},
                    ),
                    "mlp": self._mlp("mlp", "fc_in", "fc_out"),
                },
            ),
            "ln_final": NormalizationBridge(name="transformer.ln_f"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }


class GPTNeoXArchitectureAdapter(_LayerNormAdapter):
    """GPT-NeoX (Pythia)."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {
        **_LayerNormAdapter.config_values,
        "positional_embedding_type": "rotary",
        "eps_attr": "layer_norm_eps",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        rule = GroupedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads=cfg.n_heads, rows="n h")
        self.component_mapping = {
            "embed": EmbeddingBridge(name="gpt_neox.embed_in"),
            "blocks": BlockBridge(
                name="gpt_neox.layers",
                is_parallel=cfg.hf["use_parallel_residual"],
                attn_out="post_attention_dropout",
                mlp_out="post_mlp_dropout",
                submodules={
                    "ln1": NormalizationBridge(name="input_layernorm"),
                    "attn": self._joint_attention("attention", "query_key_value", "dense", rule, has_rotary=True),
                    "ln2": NormalizationBridge(name="post_attention_layernorm"),
                    "mlp": self._mlp("mlp", "dense_h_to_4h", "dense_4h_to_h"),
                },
            ),
            "ln_final": NormalizationBridge(name="gpt_neox.final_layer_norm"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }


class BloomArchitectureAdapter(_LayerNormAdapter):
    """BLOOM."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {
        **_LayerNormAdapter.config_values,
        "positional_embedding_type": "alibi",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        rule = GroupedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        attention = self._joint_attention("self_attention", "query_key_value", "dense", rule)
        attention.output_is_overwritten = True  # it is the residual stream, into which hook_resid_mid writes
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads=cfg.n_heads, rows="n h")
        self.component_mapping = {
            "embed": EmbeddingBridge(
                name="transformer.word_embeddings", ends_at="transformer.word_embeddings_layernorm"
            ),
            "embed_norm": NormalizationBridge(name="transformer.word_embeddings_layernorm"),
            "blocks": BlockBridge(
                name="transformer.h",
                attn_out="self_attention.dense",
                mlp_out="mlp.dense_4h_to_h",
                residual_is_normed=cfg.hf["apply_residual_connection_post_layernorm"],
                returns_tuple=True,
                submodules={
                    "ln1": NormalizationBridge(name="input_layernorm"),
                    "attn": attention,
                    "ln2": NormalizationBridge(name="post_attention_layernorm"),
                    "mlp": self._mlp("mlp", "dense_h_to_4h", "dense_4h_to_h"),
                },
            ),
            "ln_final": NormalizationBridge(name="transformer.ln_f"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }


class MPTArchitectureAdapter(_LayerNormAdapter):
    """MPT."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {
        **_LayerNormAdapter.config_values,
        "positional_embedding_type": "alibi",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        rule = BlockedQKVConversionRule(cfg.n_heads, cfg.d_head, cfg.n_heads)
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads=cfg.n_heads)
        self.component_mapping = {
            "embed": EmbeddingBridge(name="transformer.wte"),
            "blocks": BlockBridge(
                name="transformer.blocks",
                attn_out="resid_attn_dropout",
                mlp_out="ffn.down_proj",
                returns_tuple=True,
                submodules={
                    "ln1": NormalizationBridge(name="norm_1"),
                    "attn": self._joint_attention("attn", "Wqkv", "out_proj", rule),
                    "ln2": NormalizationBridge(name="norm_2"),
                    "mlp": self._mlp("ffn", "up_proj", "down_proj"),
                },
            ),
            "ln_final": NormalizationBridge(name="transformer.norm_f"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }


class FalconArchitectureAdapter(_LayerNormAdapter):
    """Falcon, of the old and the new architecture."""

    uses_combined_qkv = True
    config_values: ClassVar[dict[str, object]] = {
        **_LayerNormAdapter.config_values,
        "positional_embedding_type": "rotary",
    }

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        if cfg.hf["alibi"]:
            cfg.positional_embedding_type = "alibi"
        n_kv_heads = self._n_kv_heads()
        groups = n_kv_heads if 1 < n_kv_heads < cfg.n_heads else 1
        is_parallel = cfg.hf["new_decoder_architecture"] or cfg.hf["parallel_attn"]
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads, "n h", groups)
        self.component_mapping = {
            "embed": EmbeddingBridge(name="transformer.word_embeddings"),
            "blocks": BlockBridge(
                name="transformer.h", is_parallel=is_parallel, returns_tuple=True, submodules=self._parts(is_parallel)
            ),
            "ln_final": NormalizationBridge(name="transformer.ln_f"),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    def _n_kv_heads(self) -> int:
        hf = self.cfg.hf
        return hf["num_kv_heads"] if hf["new_decoder_architecture"] or not hf["multi_query"] else 1

    def _parts(self, is_parallel: bool) -> dict[str, GeneralizedComponent]:
        hf = self.cfg.hf
        has_two_norms = hf["new_decoder_architecture"] and hf["num_ln_in_parallel_attn"] in (None, 2)
        mlp = self._mlp("mlp", "dense_h_to_4h", "dense_4h_to_h")
        # The block adds attention's output into this tensor's storage.
        mlp.output_is_overwritten = mlp.submodules["out"].output_is_overwritten = is_parallel
        norms = {"ln1": "ln_attn", "ln2": "ln_mlp"} if has_two_norms else {"ln1": "input_layernorm"}
        if not is_parallel:
            norms["ln2"] = "post_attention_layernorm"
        parts: dict[str, GeneralizedComponent] = {key: NormalizationBridge(name=name) for key, name in norms.items()}
        return {**parts, "attn": self._attention(), "mlp": mlp}

    def _attention(self) -> GeneralAttentionBridge:
        cfg = self.cfg
        return JointQKVAttentionBridge(
            name="self_attention",
            qkv_conversion_rule=GroupedQKVConversionRule(cfg.n_heads, cfg.d_head, self._n_kv_heads()),
            has_rotary=not cfg.hf["alibi"],
            repeats_keys=cfg.hf["new_decoder_architecture"],
            submodules={"qkv": LinearBridge(name="query_key_value"), "o": LinearBridge(name="dense")},
        )


class OPTArchitectureAdapter(_LayerNormAdapter):
    """OPT, with norms before its sublayers or, in the 350m model, after them."""

    makes_positions_from_mask = True

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        hf = cfg.hf
        norms_before = hf["do_layer_norm_before"]
        is_projected = hf["word_embed_proj_dim"] != cfg.d_model
        self.weight_processing_conversions = self._qkvo_weight_conversions(n_kv_heads=cfg.n_heads)
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        mlp = self._mlp(None, "fc1", "fc2", Layout.FLAT)
        mlp.submodules["act"] = ActivationBridge(name="activation_fn", layout=Layout.FLAT)
        # The norm after the MLP gets rows and positions apart again.
        after = Layout.FLAT if norms_before else Layout.TOKENS
        first = NormalizationBridge(name="self_attn_layer_norm")
        first.output_is_overwritten = not norms_before  # it is the residual stream, into which hook_resid_mid writes
        self.component_mapping = {
            "embed": EmbeddingBridge(
                name="model.decoder.embed_tokens", ends_at="model.decoder.project_in" if is_projected else None
            ),
            "pos_embed": PosEmbedBridge(name="model.decoder.embed_positions", offset=2, input_is_positions=False),
            "blocks": BlockBridge(
                name="model.decoder.layers",
                norms_the_sum=not norms_before,
                submodules={
                    "ln1": first,
                    "attn": AttentionBridge(
                        name="self_attn",
                        submodules={key: LinearBridge(name=name) for key, name in names.items()},
                    ),
                    "ln2": NormalizationBridge(name="final_layer_norm", layout=after),
                    "mlp": mlp,
                },
            ),
        }
        if is_projected:
            self.component_mapping["project_in"] = LinearBridge(name="model.decoder.project_in")
            self.component_mapping["project_out"] = LinearBridge(name="model.decoder.project_out")
        if norms_before and not hf.get("_remove_final_layer_norm"):
            self.component_mapping["ln_final"] = NormalizationBridge(name="model.decoder.final_layer_norm")
        self.component_mapping["unembed"] = UnembeddingBridge(name="lm_head")
