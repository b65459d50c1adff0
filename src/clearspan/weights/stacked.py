"""Weights of the whole model by the letters of the field: those of all layers are stacked."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components import BlockBridge, EmbeddingBridge, GeneralizedComponent, PosEmbedBridge, UnembeddingBridge
from clearspan.components.weights import Weight, WeightTensor, check_writable
from clearspan.config import TransformerBridgeConfig
from clearspan.errors import MissingWeightError
from clearspan.weights.composition import Composition, CompositionScores, composition_scores
from clearspan.weights.factored_matrix import FactoredMatrix
from clearspan.weights.heads import expand_kv_heads
from clearspan.weights.ties import ties


class ModelWeights:
    """A model's weights by letter, and what is computed from weights alone.

    Embeddings and unembedding are live parameters, or views of them. Layers' parameters lie apart, so those of all
    layers are stacked copies `[layer, ...]`. They are on the graph of the parameters, and what is written into one, or
    into a view of one, is written into the model. `bridge.blocks[l].attn.W_Q` and so on are views, without a copy.

    Example:
        >>> import clearspan, torch
        >>> bridge = clearspan.boot("tiny-bigcode")
        >>> with torch.no_grad():
        ...     bridge.W_O[2, 5] = 0
        >>> bool(bridge.blocks[2].attn.W_O[5].any())
        False
    """

    cfg: TransformerBridgeConfig
    blocks: tuple[BlockBridge, ...]
    components: tuple[GeneralizedComponent, ...]
    embed: EmbeddingBridge
    pos_embed: PosEmbedBridge
    unembed: UnembeddingBridge

    @Weight
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding `[d_vocab, d_model]`: the live parameter."""
        return self.embed.W_E

    @Weight
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """Position embedding `[pos, d_model]`: the live parameter, or a view of it.

        Raises:
            MissingWeightError: Positions are not learned.
        """
        if "pos_embed" not in vars(self):
            reason = "positions come by rotation or as a bias of the scores, not by a learned embedding"
            raise MissingWeightError("the model has no W_pos", reason=reason)
        return self.pos_embed.W_pos

    @Weight
    def W_E_pos(self) -> Float[Tensor, "d_vocab+pos d_model"]:
        """Token and position embedding below each other `[d_vocab + pos, d_model]`: a copy that writes through.

        Raises:
            MissingWeightError: Positions are not learned, or token embeddings are of another width.
        """
        if self.embed.width != self.cfg.d_model:
            reason = f"token embeddings are {self.embed.width} wide, and projected to the residual stream"
            raise MissingWeightError("the model has no W_E_pos", reason=reason)
        return joined([self.W_E, self.W_pos], torch.cat)

    @Weight
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding `[d_model, d_vocab]`: a view."""
        return self.unembed.W_U

    @Weight
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """Unembedding bias `[d_vocab]`: the live parameter, or zeros of stride 0 where there is none."""
        return self.unembed.b_U

    @Weight
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights `[layer, head, d_model, d_head]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "W_Q")

    @Weight
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key weights `[layer, kv_head, d_model, d_head]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "W_K")

    @Weight
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Value weights `[layer, kv_head, d_model, d_head]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "W_V")

    @Weight
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights `[layer, head, d_head, d_model]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "W_O")

    @Weight
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases `[layer, head, d_head]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "b_Q")

    @Weight
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Key biases `[layer, kv_head, d_head]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "b_K")

    @Weight
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Value biases `[layer, kv_head, d_head]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "b_V")

    @Weight
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Output biases `[layer, d_model]`: a copy that writes through."""
        return stacked(self.blocks, "attn", "b_O")

    @Weight
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """MLP input weights `[layer, d_model, d_mlp]`: a copy that writes through."""
        return stacked(self.blocks, "mlp", "W_in")

    @Weight
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Weights of the MLP's gate `[layer, d_model, d_mlp]`: a copy that writes through."""
        return stacked(self.blocks, "mlp", "W_gate")

    @Weight
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """MLP output weights `[layer, d_mlp, d_model]`: a copy that writes through."""
        return stacked(self.blocks, "mlp", "W_out")

    @Weight
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """MLP input biases `[layer, d_mlp]`: a copy that writes through."""
        return stacked(self.blocks, "mlp", "b_in")

    @Weight
    def b_gate(self) -> Float[Tensor, "layer d_mlp"]:
        """Biases of the MLP's gate `[layer, d_mlp]`: a copy that writes through."""
        return stacked(self.blocks, "mlp", "b_gate")

    @Weight
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """MLP output biases `[layer, d_model]`: a copy that writes through."""
        return stacked(self.blocks, "mlp", "b_out")

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """Each weight that is one parameter with others, with their names; empty where none is tied.

        Example:
            >>> import clearspan
            >>> clearspan.boot("tiny-bigcode").tied
            {'W_E': ('W_U',), 'W_U': ('W_E',)}
        """
        return ties(self.components)

    def expand_kv_heads(self, value: Tensor, axis: int = -3, *, by_group: bool = False) -> Tensor:
        """Returns weights or activations of key/value heads for all query heads: a view where one can be.

        The arguments are those of `clearspan.weights.expand_kv_heads`.
        """
        return expand_kv_heads(value, self.cfg.n_heads, axis, by_group=by_group)

    @property
    def QK(self) -> FactoredMatrix:
        """Each head's `W_Q W_K^T`, `[layer, head, d_model, d_model]`: what a query position looks for, by key position.

        Rotation, norms of queries and keys, scale and biases are not in it.

        Raises:
            MissingWeightError: Queries or keys are no linear map of the residual stream.
        """
        return FactoredMatrix(self.W_Q, self.expand_kv_heads(self.W_K).mT)

    @property
    def OV(self) -> FactoredMatrix:
        """Each head's `W_V W_O`, `[layer, head, d_model, d_model]`: what it writes for what it reads. Biases apart."""
        return FactoredMatrix(self.expand_kv_heads(self.W_V), self.W_O)

    def composition_scores(self, mode: Composition, *, samples: int = 4, seed: int = 0) -> CompositionScores:
        """Returns how much each head reads of what earlier heads write, with a random baseline.

        Args:
            mode: What the reader uses it for: `"Q"`, `"K"` or `"V"`.
            samples: Random heads for the baseline, in multiples of all heads.
            seed: Of the baseline.

        Example:
            >>> import clearspan
            >>> found = clearspan.boot("tiny-bigcode").composition_scores("K")
            >>> tuple(found.scores.shape)
            (5, 8, 5, 8)
        """
        return composition_scores(self.OV, self.QK, mode, samples=samples, seed=seed)


def stacked(blocks: Sequence[BlockBridge], part: str, name: str) -> Tensor:
    """Returns a weight of all layers as one copy, from which a write goes on to the layers.

    Raises:
        MissingWeightError: A layer does not have it, or not of the same shape.
    """
    live: dict[int, Tensor] = {}
    lacking: dict[int, MissingWeightError] = {}
    for layer, block in enumerate(blocks):
        try:
            live[layer] = getattr(block.submodules[part], name)
        except MissingWeightError as error:
            lacking[layer] = error
    if lacking:
        layers = "no layer has it" if not live else f"layers {', '.join(map(str, lacking))} do not have it"
        fix = f"bridge.blocks[{next(iter(live))}].{part}.{name} where there is one" if live else None
        raise MissingWeightError(
            f"{name} cannot be stacked: {layers}",
            where=type(blocks[0].module).__name__,
            reason=next(iter(lacking.values())).message.replace("\n  ", "; "),
            fix=fix,
        )
    shapes = {tuple(weight.shape): layer for layer, weight in live.items()}
    if len(shapes) > 1:
        found = ", ".join(f"{list(shape)} in layer {layer}" for shape, layer in shapes.items())
        raise MissingWeightError(
            f"{name} cannot be stacked: layers differ in shape", got=found, fix=f"bridge.blocks[layer].{part}.{name}"
        )
    return joined(list(live.values()), torch.stack)


def joined(parts: Sequence[Tensor], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Returns parts joined along the first axis in one copy, from which a write goes on to each.

    Args:
        parts: Live weights.
        join: `torch.stack` or `torch.cat`.
    """
    copy = join(list(parts))

    def before() -> None:
        for part in parts:
            check_writable(part)

    def after() -> None:
        pieces = copy.detach().split([1 if join is torch.stack else len(part) for part in parts])
        with torch.no_grad():
            for part, piece in zip(parts, pieces, strict=True):
                part.copy_(piece.reshape(part.shape))

    return WeightTensor.of(copy, before=before, after=after)
