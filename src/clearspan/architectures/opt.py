"""OPT: norms before its sublayers or, in the 350m model, after them; embeddings of a width of their own."""

from collections.abc import Mapping
from typing import Any, ClassVar

from clearspan.architectures.decoder import LAYER_NORM, SPLIT_EVENLY, DecoderAdapter
from clearspan.components import (
    ActivationBridge,
    AttentionBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
)
from clearspan.points import Layout


class OPTArchitectureAdapter(DecoderAdapter):
    """OPT, with norms before its sublayers or, in the 350m model, after them."""

    makes_positions_from_mask = True
    config_values: ClassVar[dict[str, object]] = LAYER_NORM
    sizes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SPLIT_EVENLY,
        "n_ctx": ("max_position_embeddings",),
        "d_mlp": ("ffn_dim",),
        "act_fn": ("activation_function",),
    }
    embed_name = "model.decoder.embed_tokens"
    blocks_name = "model.decoder.layers"
    final_norm_name = "model.decoder.final_layer_norm"

    @property
    def _norms_before(self) -> bool:
        return self.cfg.hf["do_layer_norm_before"]

    @property
    def _is_projected(self) -> bool:
        return self.cfg.hf["word_embed_proj_dim"] != self.cfg.d_model

    def _components(self) -> dict[str, GeneralizedComponent]:
        frame = super()._components()
        positions = PosEmbedBridge(name="model.decoder.embed_positions", offset=2, input_is_positions=False)
        inward, outward = ({}, {})
        if self._is_projected:
            inward = {"project_in": LinearBridge(name="model.decoder.project_in")}
            outward = {"project_out": LinearBridge(name="model.decoder.project_out")}
        if not self._norms_before or self.cfg.hf.get("_remove_final_layer_norm"):
            del frame["ln_final"]
        embed, unembed = frame.pop("embed"), frame.pop("unembed")
        return {"embed": embed, **inward, "pos_embed": positions, **frame, **outward, "unembed": unembed}

    def _embed(self) -> EmbeddingBridge:
        ends_at = "model.decoder.project_in" if self._is_projected else None
        return EmbeddingBridge(name=self.embed_name, ends_at=ends_at)

    def _wiring(self) -> dict[str, Any]:
        return {"norms_the_sum": not self._norms_before}

    def _parts(self) -> dict[str, GeneralizedComponent]:
        first = self._norm("self_attn_layer_norm")
        first.output_is_overwritten = not self._norms_before  # it is the residual stream: hook_resid_mid writes into it
        # The MLP gets rows and positions in one axis; a norm after the MLP gets them as two axes.
        second = Layout.FLAT if self._norms_before else Layout.TOKENS
        projections = self._linears(q="q_proj", k="k_proj", v="v_proj", o="out_proj")
        return {
            "ln1": first,
            "attn": AttentionBridge(name="self_attn", submodules=projections),
            "ln2": NormalizationBridge(name="final_layer_norm", layout=second),
            "mlp": self._mlp(),
        }

    def _mlp(self) -> MLPBridge:
        act = ActivationBridge(name="activation_fn", layout=Layout.FLAT)
        return MLPBridge(submodules={**self._linears(Layout.FLAT, in_="fc1", out="fc2"), "act": act})
