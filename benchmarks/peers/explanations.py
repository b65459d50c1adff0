"""Why clearspan's cached values differ from TransformerLens 4.3.0's, as data: one entry for each kind of names."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["value", "padding", "shape", "dtype", "switch", "only clearspan", "only TransformerLens"]
"""How a name differs.

- value: the numbers differ.
- padding: the numbers differ, at padding positions alone.
- shape, dtype: those differ.
- switch: TransformerLens has the value only with a switch on.
- only ...: one library alone caches the name.
"""


@dataclass(frozen=True)
class Explanation:
    """Why names that match `names` differ in this way; `same_as` is the other library's name of the same numbers."""

    kind: Kind
    names: str
    text: str
    same_as: str | None = None


AFTER_ATTENTION = (
    r"blocks\.0\.(attn\.(hook_z|hook_result|hook_out|o\..*)|hook_(attn_out|resid_mid|mlp_in|mlp_out|resid_post|out)|"
    r"(ln2|mlp)\..*)|blocks\.[12]\.(?!attn\.hook_(attn_scores|pattern)).*|(ln_final|unembed)\..*"
)
"""What the first block's attention reaches, but scores and patterns."""

EXPLANATIONS = (
    Explanation(
        "padding",
        AFTER_ATTENTION,
        "Only at padding positions, where a query may attend to nothing. clearspan shows what the model's own fused "
        "kernel makes there, zeros in hook_z, and what follows from it. TransformerLens computes attention itself as "
        "eager attention does, and a softmax that is masked throughout is even over all keys. With eager attention in "
        "clearspan's model the difference is gone. hook_pattern is even in both libraries: clearspan computes it by "
        "the model's eager function, so at these positions it is not what the fused kernel made hook_z with.",
    ),
    Explanation(
        "switch",
        r"blocks\.\d+\.(attn\.hook_result|hook_mlp_in|hook_[qkv]_input|hook_attn_in)",
        "TransformerLens has the name, and computes the value only after a set_use_... switch. Compared with it on.",
    ),
    Explanation(
        "shape",
        r"blocks\.\d+\.hook_attn_in",
        "TransformerLens has a copy for each query head, clearspan for each group that shares a key and value head, "
        "since the key head reads the residual stream once.",
    ),
    Explanation(
        "shape",
        r"blocks\.\d+\.attn\.([qkv]\.hook_out|o\.hook_in)",
        "In TransformerLens hook_q, hook_k, hook_v and hook_z are aliases of these, so heads are apart. In clearspan "
        "these are the raw ends of the module and have its own width; hook_q, hook_k, hook_v and hook_z are by head.",
    ),
    Explanation(
        "shape",
        r"pos_embed\.hook_in",
        "The model makes one row of positions for the batch. clearspan shows it for each row, so that a write can "
        "differ between rows; TransformerLens shows the one row.",
    ),
    Explanation(
        "only clearspan",
        r"hook_logits",
        "TransformerLens has no point for what the model returns. In these models that is the unembedding's output.",
        same_as="unembed.hook_out",
    ),
    Explanation(
        "only clearspan",
        r"(blocks\.\d+\.attn)\.qkv\.hook_in",
        "TransformerLens splits the fused projection in three when it loads, and never calls the fused module: its own "
        "point of this name does not fire. Each of the three has the same input.",
        same_as=r"\1.q.hook_in",
    ),
    Explanation(
        "only clearspan",
        r"blocks\.\d+\.attn\.qkv\.hook_out",
        "TransformerLens never calls the fused module, so its own point of this name does not fire. The parts, hook_q, "
        "hook_k and hook_v, are equal.",
    ),
    Explanation(
        "only TransformerLens",
        r"(blocks\.\d+\.attn)\.[qkv]\.hook_in",
        "The input of one of the three projections that TransformerLens made of the fused one. In clearspan the fused "
        "module has one input.",
        same_as=r"\1.qkv.hook_in",
    ),
    Explanation(
        "only TransformerLens",
        r"(blocks\.\d+\.attn)\.([qkv])\.hook_out",
        "The output of one of the three projections that TransformerLens made of the fused one. The model has no "
        "module there; clearspan has the value as hook_q, hook_k or hook_v alone.",
        same_as=r"\1.hook_\2",
    ),
    Explanation(
        "only TransformerLens",
        r"(blocks\.\d+\.attn)\.hook_hidden_states",
        "A second point at the output of attention, besides attn.hook_out.",
        same_as=r"\1.hook_out",
    ),
    Explanation(
        "only TransformerLens",
        r"(blocks\.\d+)\.attn\.(hook_[qkv]_input|hook_attn_in)",
        "TransformerLens has these points, with a switch on, in attention too; those on the block are aliases of them. "
        "clearspan has them on the block alone.",
        same_as=r"\1.\2",
    ),
    Explanation(
        "only TransformerLens",
        r"hook_unembed",
        "Another name of the unembedding's output.",
        same_as="unembed.hook_out",
    ),
    Explanation(
        "only TransformerLens",
        r"rotary_emb\.hook_in",
        "The rotary module is given the embeddings, of which it uses only the dtype and the device.",
        same_as="hook_embed",
    ),
    Explanation(
        "only TransformerLens",
        r"(rotary_emb|blocks\.\d+\.attn)\.hook_(cos|sin)",
        "Tables of the rotary embedding, which depend on positions alone. clearspan has no point for them; "
        "hook_rot_q and hook_rot_k, which use them, are equal.",
    ),
)
