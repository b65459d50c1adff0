"""Weights of all layers, stacked: copies, since layers' parameters lie apart. A block's own are views."""

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components import BlockBridge, EmbeddingBridge, PosEmbedBridge, UnembeddingBridge


class StackedWeights:
    """The bridge's weight attributes, by the letters of the field.

    Embedding and unembedding are the live parameters or views of them. The rest are stacked copies `[layer, ...]`, on
    the graph of the parameters; `bridge.blocks[l].attn.W_Q` and so on are views: a write there reaches the model.
    """

    blocks: tuple[BlockBridge, ...]
    embed: EmbeddingBridge
    pos_embed: PosEmbedBridge
    unembed: UnembeddingBridge

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding `[d_vocab, d_model]`: the live parameter."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """Position embedding `[pos, d_model]`: the live parameter."""
        return self.pos_embed.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding `[d_model, d_vocab]`: a view."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """Unembedding bias `[d_vocab]`: the live parameter, or zeros of stride 0 where there is none."""
        return self.unembed.b_U

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights `[layer, head, d_model, d_head]`: a copy."""
        return torch.stack([block.attn.W_Q for block in self.blocks])

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key weights `[layer, kv_head, d_model, d_head]`: a copy."""
        return torch.stack([block.attn.W_K for block in self.blocks])

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Value weights `[layer, kv_head, d_model, d_head]`: a copy."""
        return torch.stack([block.attn.W_V for block in self.blocks])

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights `[layer, head, d_head, d_model]`: a copy."""
        return torch.stack([block.attn.W_O for block in self.blocks])

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases `[layer, head, d_head]`: a copy."""
        return torch.stack([block.attn.b_Q for block in self.blocks])

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Key biases `[layer, kv_head, d_head]`: a copy."""
        return torch.stack([block.attn.b_K for block in self.blocks])

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Value biases `[layer, kv_head, d_head]`: a copy."""
        return torch.stack([block.attn.b_V for block in self.blocks])

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Output biases `[layer, d_model]`: a copy."""
        return torch.stack([block.attn.b_O for block in self.blocks])

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """MLP input weights `[layer, d_model, d_mlp]`: a copy."""
        return torch.stack([block.mlp.W_in for block in self.blocks])

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """MLP input biases `[layer, d_mlp]`: a copy."""
        return torch.stack([block.mlp.b_in for block in self.blocks])

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """MLP output weights `[layer, d_mlp, d_model]`: a copy."""
        return torch.stack([block.mlp.W_out for block in self.blocks])

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """MLP output biases `[layer, d_model]`: a copy."""
        return torch.stack([block.mlp.b_out for block in self.blocks])
