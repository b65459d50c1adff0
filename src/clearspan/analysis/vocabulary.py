"""Weights read in vocabulary: the tokens on which the singular vectors of a head's or an MLP's matrix act."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.readout import FrozenNorm, added_logits, exact
from clearspan.analysis.words import Words, words_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_choice, check_counts, is_whole
from clearspan.components.factors import scaled
from clearspan.errors import InvalidArgumentError
from clearspan.model import check_bridge, check_layers
from clearspan.modes import no_grad
from clearspan.plots import HeatMap
from clearspan.results import Columns, Result
from clearspan.weights.factored_matrix import SVD, FactoredMatrix

if TYPE_CHECKING:
    import plotly.graph_objects as go

ReadableMatrix = Literal["OV", "W_in", "W_gate", "W_out"]
Side = Literal["reads", "writes"]
ReadBy = Literal["embed", "unembed"]
_ROWS = 4096
"""Tokens embedded at a time."""


@dataclass(frozen=True, eq=False)
class VocabularySide:
    """The tokens at both ends of each singular vector on one side of a matrix, on the CPU.

    The first end (`+`) is that of the vector, the second (`-`) that of the same vector with the other sign.

    Attributes:
        ids: Tokens, strongest first.
        scores: How strongly, each end by its own sign.
    """

    ids: Int[Tensor, "value end token"]
    scores: Float[Tensor, "value end token"]


@dataclass(frozen=True, eq=False, repr=False)
class SingularReadings(Result):
    """What the leading singular vectors of a matrix read and write, in tokens.

    The sign of a singular vector is free: that of both sides together is no property of the matrix. So each has two
    ends that belong together: what `+` reads makes it write `+`, and what `-` reads makes it write `-`.

    Attributes:
        matrix: Which matrix.
        layer: Whose.
        head: Whose, for `OV`.
        values: Singular values, largest first.
        shares: Their squares, as shares of the sum of all squares.
        reads: Tokens that lie along the reading side, through the norm that reads them; None for `W_out`, which reads
            neurons.
        writes: Tokens whose logit the writing side raises, for a scale of 1 of the norms after it; None for `W_in` and
            `W_gate`, which write to neurons.
        neurons: Neurons that a vector of `W_out` reads, or that one of `W_in` or `W_gate` writes to, with its
            components as scores; None for `OV`, which has vocabulary on both sides.
        reading_vectors: The vectors on the reading side, of norm 1, with the signs of `+`: of the norm's output, or of
            neurons.
        writing_vectors: The same on the writing side: of the sublayer's output, or of neurons.
        words: Texts of tokens.
    """

    matrix: ReadableMatrix
    layer: int
    head: int | None
    values: Float[Tensor, "value"]
    shares: Float[Tensor, "value"]
    reads: VocabularySide | None
    writes: VocabularySide | None
    neurons: VocabularySide | None
    reading_vectors: Float[Tensor, "value d_in"]
    writing_vectors: Float[Tensor, "value d_out"]
    words: Words

    shown: ClassVar[int] = 16

    @property
    def title(self) -> str:
        """Which matrix it is, and the share of the vectors shown."""
        name = f"{self.matrix} of " + (f"layer {self.layer}" if self.head is None else f"L{self.layer}H{self.head}")
        count = len(self.values)
        return f"{name}: tokens of the first {count} singular vectors, {self.shares.sum():.0%} of the squared norm"

    @property
    def _sides(self) -> dict[Side, VocabularySide]:
        both: dict[Side, VocabularySide | None] = {"reads": self.reads, "writes": self.writes}
        return {name: side for name, side in both.items() if side is not None}

    def columns(self) -> Columns:
        """Returns two rows for each singular value, one for each end, with its tokens."""
        count = len(self.values)
        return {
            "vector": [number for number in range(count) for _ in "+-"],
            "singular value": [value for value in self.values.tolist() for _ in "+-"],
            "end": ["+", "-"] * count,
            **{
                name: [" ".join(self.words[token] for token in end) for end in side.ids.flatten(0, 1).tolist()]
                for name, side in self._sides.items()
            },
            **({} if self.neurons is None else {"neurons": _numbers(self.neurons)}),
        }

    def plot(self, side: Side | None = None) -> "go.Figure":
        """Returns a plotly figure; arguments are those of `chart`."""
        return self.chart(side).figure()

    def chart(self, side: Side | None = None) -> HeatMap:
        """Returns a grid of one side: singular vectors and their ends down, tokens from left to right, by score.

        Args:
            side: Which; by default what is written, where there is that.

        Raises:
            InvalidArgumentError: The matrix does not have that side in vocabulary.
        """
        name = list(self._sides)[-1] if side is None else side
        if not isinstance(name, str) or name not in self._sides:
            raise InvalidArgumentError(
                f"{self.matrix} has no side {name!r} in vocabulary", expected=" or ".join(map(repr, self._sides))
            )
        shown = self._sides[name]
        return HeatMap(
            shown.scores.flatten(0, 1),
            [str(rank) for rank in range(shown.ids.shape[-1])],
            [f"{number} {end}" for number in range(len(self.values)) for end in "+-"],
            "rank",
            "singular vector",
            "score",
            f"{self.title}: what it {name}",
            texts=[[self.words[token] for token in row] for row in shown.ids.flatten(0, 1).tolist()],
        )


def _numbers(neurons: VocabularySide) -> list[str]:
    return [" ".join(f"N{number}" for number in end) for end in neurons.ids.flatten(0, 1).tolist()]


@no_grad
def singular_readings(
    bridge: TransformerBridge,
    matrix: ReadableMatrix,
    layer: int,
    head: int | None = None,
    *,
    k: int = 8,
    tokens: int = 10,
    reads_by: ReadBy = "embed",
) -> SingularReadings:
    """Returns the tokens that the leading singular vectors of a matrix read and write.

    `M = sum over i of S_i * u_i v_i^T`. A matrix multiplies a row from the right: it reads along `u_i` and writes along
    `v_i`, `S_i` times as much.

    - `"OV"`: a head's `W_V W_O`, from its factors; the product is not formed. It reads and writes the residual stream.
    - `"W_in"`, `"W_gate"`: an MLP's input maps. They read the stream, and write to neurons.
    - `"W_out"`: an MLP's output map. It reads neurons, and writes the stream.

    What `u` reads is scored for every token by `norm(e) @ u` (`reads_by="embed"`), where `e` is the token's embedding
    as it enters the residual stream (after any scale, norm or projection), and `norm` that before the sublayer, as if
    nothing else were in the stream. Its bias, which all tokens share, is left out. By later layers the stream has more
    of a token than its embedding: `reads_by="unembed"` scores by the logit that `u` itself adds, as a direction of the
    stream, so that a token counts where the stream already leads to it.

    What `v` writes is scored by the logits that it adds through a norm on the sublayer's output, the last norm, and the
    unembedding. Norms are taken by their weights, for a scale of 1.

    The matrix is taken as it is in the model. `bridge.processed()` folds norms' weights into it, and that gives other
    singular vectors. Random directions have strongest tokens too: whether a list means something is a judgement.

    Args:
        bridge: The model.
        matrix: Which matrix.
        layer: Whose; negative from the end.
        head: Whose, for `"OV"` alone; negative from the end.
        k: How many singular vectors.
        tokens: How many tokens at each end, and neurons; `bridge.cfg.d_vocab` for all.
        reads_by: How the reading side meets tokens.

    Raises:
        InvalidArgumentError: An unknown matrix, a layer or head that does not exist, a head for an MLP's matrix, or
            more vectors or tokens than there are.
        MissingWeightError: The layer has no such matrix, or, as a mixture of experts, many.

    Example:
        >>> import clearspan
        >>> found = singular_readings(clearspan.boot("tiny-bigcode"), "W_out", layer=4, k=1, tokens=3)
        >>> found.columns()["writes"][1]
        '⏎······· ⏎··········· ⏎'

    References:
        Millidge and Black (2022), "The Singular Value Decompositions of Transformer Weight Matrices are Highly
        Interpretable", alignmentforum.org. There singular vectors meet the unembedding alone. Here norms' weights come
        between, the reading side meets embeddings by default, and both ends are shown.
    """
    check_choice(get_args(ReadBy), reads_by=reads_by)
    layer, head = _place(bridge, matrix, layer, head)
    U, values, V = _svd(bridge, matrix, layer, head)
    _check_count("k", k, len(values))
    part = "attn" if matrix == "OV" else "mlp"
    reads = None if matrix == "W_out" else _READ[reads_by](bridge, U[:, :k].T, layer, part)
    writes = None if matrix in ("W_in", "W_gate") else _written(bridge, V[:, :k].T, layer, part)
    shown = writes if writes is not None else reads
    assert shown is not None, "every matrix reads or writes the residual stream"
    # The end with the stronger token is `+`, so that the sign does not depend on how the decomposition was computed.
    sign = torch.where(shown.amax(-1) < -shown.amin(-1), -1.0, 1.0)[:, None]
    reading, writing = (None if scores is None else _ends(scores * sign, tokens) for scores in (reads, writes))
    left, right = (side.cpu() * sign.cpu() for side in (U[:, :k].T, V[:, :k].T))
    of_neurons = {"OV": None, "W_out": left}.get(matrix, right)
    neurons = None if of_neurons is None else _ends(of_neurons, min(tokens, of_neurons.shape[1]))
    shares = values.square() / values.square().sum()
    ids = [side.ids for side in (reading, writing) if side is not None]
    return SingularReadings(
        matrix,
        layer,
        head,
        values[:k].cpu(),
        shares[:k].cpu(),
        reading,
        writing,
        neurons,
        left,
        right,
        words_of(bridge, *ids),
    )


def _svd(bridge: TransformerBridge, matrix: ReadableMatrix, layer: int, head: int | None) -> SVD:
    """Returns the decomposition of a matrix that multiplies a row from the right, in float32 at least."""
    block = bridge.blocks[layer]
    match matrix:
        case "OV":
            assert head is not None, "checked before"
            return FactoredMatrix(bridge.expand_kv_heads(block.attn.W_V)[head], block.attn.W_O[head]).svd()
        case "W_in":
            weight = block.mlp.W_in
        case "W_gate":
            weight = block.mlp.W_gate
        case "W_out":
            weight = block.mlp.W_out
    U, S, Vh = torch.linalg.svd(exact(weight), full_matrices=False)
    return SVD(U, S, Vh.mT)


def _read(
    bridge: TransformerBridge, vectors: Float[Tensor, "value d_model"], layer: int, part: str
) -> Float[Tensor, "value d_vocab"]:
    """Returns how strongly each token's embedding, through the norm that a sublayer reads through, excites vectors."""
    norm = bridge.blocks[layer].sublayer(part).norm
    along = vectors if norm is None else FrozenNorm.of(norm).weighted(vectors)
    scores = []
    for ids in torch.arange(bridge.embed.n_tokens).split(_ROWS):
        _, cache = bridge.run_with_cache(ids[:, None], "hook_embed", return_type=None, stop_at_layer=0)
        embedded = exact(cache["hook_embed"][:, 0])
        scores.append((embedded if norm is None else norm.normalize(embedded)) @ along.T)
    return torch.cat(scores).T


def _read_by_unembedding(
    bridge: TransformerBridge, vectors: Float[Tensor, "value d_model"], layer: int, part: str
) -> Float[Tensor, "value d_vocab"]:
    """Returns how strongly the direction that raises each token's logit excites vectors, for scales of 1 of norms."""
    norm = bridge.blocks[layer].sublayer(part).norm
    return added_logits(bridge, vectors if norm is None else FrozenNorm.of(norm).pulled_back(vectors))


_READ = {"embed": _read, "unembed": _read_by_unembedding}
"""How the reading side meets tokens."""


def _written(
    bridge: TransformerBridge, vectors: Float[Tensor, "value d_model"], layer: int, part: str
) -> Float[Tensor, "value d_vocab"]:
    """Returns the logits that vectors in a sublayer's output add, for a scale of 1 of the norms after it."""
    own = bridge.blocks[layer].sublayer(part)
    if own.norm_after is not None:
        vectors = FrozenNorm.of(own.norm_after)(vectors)
    return added_logits(bridge, scaled(vectors, own.multiplier))


def _ends(scores: Float[Tensor, "value d_vocab"], tokens: int) -> VocabularySide:
    _check_count("tokens", tokens, scores.shape[1])
    strongest = torch.stack([scores, -scores], dim=1).topk(tokens)
    return VocabularySide(strongest.indices.cpu(), strongest.values.cpu())


def _check_count(name: str, count: int, most: int) -> None:
    check_counts(0, **{name: count})
    if not 1 <= count <= most:
        raise InvalidArgumentError(f"{name}={count} cannot be shown", expected=f"1 to {most}")


def _place(bridge: TransformerBridge, matrix: ReadableMatrix, layer: int, head: int | None) -> tuple[int, int | None]:
    """Returns a matrix's layer and head, counted from 0."""
    check_bridge(bridge)
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    if matrix not in get_args(ReadableMatrix):
        raise InvalidArgumentError(f"unknown matrix {matrix!r}", expected="'OV', 'W_in', 'W_gate' or 'W_out'")
    if not is_whole(layer) or not -n_layers <= layer < n_layers:
        raise InvalidArgumentError(f"there is no layer {layer}", expected=f"0 to {n_layers - 1}", got=str(layer))
    check_layers(bridge, "attn" if matrix == "OV" else "mlp", [layer % n_layers])
    if matrix != "OV":
        if head is not None:
            raise InvalidArgumentError(f"{matrix} is the whole MLP's", expected="head=None", got=f"head={head}")
        return layer % n_layers, None
    if not is_whole(head) or not -n_heads <= head < n_heads:
        raise InvalidArgumentError("OV is one head's", expected=f"head=0 to {n_heads - 1}", got=f"head={head}")
    return layer % n_layers, head % n_heads
