"""OPT: norms before its sublayers or, in the 350m model, after them; embeddings of a width of their own."""

from collections.abc import Mapping
from typing import ClassVar

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes, entries
from clearspan.architectures.parts import attention, block, decoder, embedding, mlp, norm, pos_embedding
from clearspan.components import BlockBridge, GeneralizedComponent
from clearspan.config import TransformerBridgeConfig
from clearspan.points import Layout


class OPTArchitectureAdapter(ArchitectureAdapter):
    """OPT, with norms before its sublayers or, in the 350m model, after them."""

    makes_positions_from_mask = True
    sizes: ClassVar[Sizes] = entries(n_ctx="max_position_embeddings", act_fn="activation_function", d_mlp="ffn_dim")

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        is_projected = cfg.hf["word_embed_proj_dim"] != cfg.d_model
        has_last = cfg.hf["do_layer_norm_before"] and not cfg.hf.get("_remove_final_layer_norm")
        inward, outward = (f"model.decoder.project_{way}" if is_projected else None for way in ("in", "out"))
        return decoder(
            embed=embedding("model.decoder.embed_tokens", ends_at=inward),
            project_in=inward,
            pos_embed=pos_embedding("model.decoder.embed_positions", offset=2, from_mask=True),
            blocks=self.blocks(norms_before=cfg.hf["do_layer_norm_before"]),
            ln_final=norm("model.decoder.final_layer_norm") if has_last else None,
            project_out=outward,
        )

    def blocks(self, *, norms_before: bool) -> BlockBridge:
        """Returns the blocks."""
        return block(
            "model.decoder.layers",
            norms_the_sum=not norms_before,
            # After attention it is the residual stream: hook_resid_mid writes into it.
            ln1=norm("self_attn_layer_norm", overwritten=not norms_before),
            attn=attention("self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
            # The MLP gets rows and positions in one axis; a norm after the MLP gets them as two axes.
            ln2=norm("final_layer_norm", layout=Layout.FLAT if norms_before else Layout.TOKENS),
            mlp=mlp(None, in_="fc1", act="activation_fn", out="fc2", layout=Layout.FLAT),
        )
