"""What a bridge knows about its model in figures: one dataclass with the field's names."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from clearspan.transformer_lens import ConfigNames


@dataclass(kw_only=True)
class TransformerBridgeConfig(ConfigNames):
    """Sizes and properties of a model under TransformerLens's names.

    The first group is read from the model's Hugging Face config; the second is set by the architecture's adapter.

    Attributes:
        d_model: Width of the residual stream.
        n_heads: Query heads; 0 without attention.
        d_head: Width of a head; 0 without attention.
        n_layers: Blocks.
        n_ctx: Most positions of one input.
        d_vocab: Vocabulary.
        d_mlp: Width of the MLP's hidden layer.
        act_fn: The MLP's activation function, by Hugging Face's name.
        eps: Added to the variance in norms.
        n_key_value_heads: Key and value heads; None where the config does not say.
        architecture: Class name of the Hugging Face model.
        model_name: What was booted.
        dtype: Of the weights.
        default_prepend_bos: Whether text gets a BOS token where a call does not say.
        hf: The Hugging Face config's own entries, for what only one family knows; of a model that sees or hears too,
            with those of its text model, which count where both have one.
        output_logits_soft_cap: Where the model caps its logits by `cap * tanh(logits / cap)`, or None.
        logit_scale: What the model multiplies the unembedding's output by.
        positional_embedding_type: How positions enter: `standard` (a table is added to the embedding), `sinusoidal`
            (what is added is computed, for any length), `rotary`, `alibi`, or `none`.
        has_table: Whether rotations, biases or sines lie in a table of `n_ctx` positions, and no more can be computed.
    """

    d_model: int
    n_heads: int
    n_layers: int
    n_ctx: int
    d_vocab: int
    d_head: int = 0
    d_mlp: int = 0
    act_fn: str = "gelu"
    eps: float = 1e-5
    n_key_value_heads: int | None = None
    architecture: str = ""
    model_name: str = ""
    dtype: torch.dtype = field(default=torch.float32)
    default_prepend_bos: bool = True
    hf: Mapping[str, Any] = field(default_factory=dict, repr=False)

    normalization_type: Literal["LN", "RMS"] = "LN"
    positional_embedding_type: Literal["standard", "sinusoidal", "rotary", "alibi", "none"] = "standard"
    final_rms: bool = False
    gated_mlp: bool = False
    attn_only: bool = False
    uses_rms_norm: bool = False
    eps_attr: str = "layer_norm_epsilon"
    split_attention_weights: bool = False
    uses_split_attention: bool = False
    output_logits_soft_cap: float | None = None
    logit_scale: float = 1.0
    has_table: bool = False

    def __post_init__(self) -> None:
        self.d_head = self.d_head or (self.d_model // self.n_heads if self.n_heads else 0)
        self.d_mlp = self.d_mlp or 4 * self.d_model

    @property
    def is_limited(self) -> bool:
        """Whether there is no position past `n_ctx`: the model looks positions up in a table."""
        return self.has_table or self.positional_embedding_type == "standard"

    def update(self, values: dict[str, object]) -> None:
        """Sets fields by name; a name that is no field raises."""
        names = {f.name for f in fields(self)}
        for name, value in values.items():
            assert name in names, f"no field {name!r} in TransformerBridgeConfig"
            setattr(self, name, value)
