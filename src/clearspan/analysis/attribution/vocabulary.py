"""Weights read in vocabulary: the tokens on which the singular vectors of a head's or an MLP's matrix act."""

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan._cache.readings import norm_at
from clearspan.analysis.lenses.streams import words_of
from clearspan.bridge import TransformerBridge
from clearspan.components import NormalizationBridge
from clearspan.errors import InvalidArgumentError
from clearspan.weights import SVD, FactoredMatrix

from .readout import centred, exact, logits_of, weighted
from .vocabulary_result import ReadableMatrix, SingularReadings, VocabularySide

_ROWS = 4096
"""Tokens embedded at a time."""


@torch.no_grad()
def singular_readings(
    bridge: TransformerBridge,
    matrix: ReadableMatrix,
    layer: int,
    head: int | None = None,
    *,
    k: int = 8,
    tokens: int = 10,
) -> SingularReadings:
    """Returns the tokens that the leading singular vectors of a matrix read and write.

    `M = sum over i of S_i * u_i v_i^T`. A matrix multiplies a row from the right: it reads along `u_i` and writes along
    `v_i`, `S_i` times as much.

    - `"OV"`: a head's `W_V W_O`, from its factors; the product is not formed. It reads and writes the residual stream.
    - `"W_in"`, `"W_gate"`: an MLP's input maps. They read the stream, and write to neurons.
    - `"W_out"`: an MLP's output map. It reads neurons, and writes the stream.

    What `u` reads is scored for every token by `norm(e) @ u`, where `e` is the token's embedding as it enters the
    residual stream (after any scale, norm or projection), and `norm` that before the sublayer, as if nothing else were
    in the stream. Its bias, which all tokens share, is left out. By later layers the stream has more of a token than
    its embedding.

    What `v` writes is scored by the logits that it adds through a norm on the sublayer's output, the last norm, and the
    unembedding. Norms are taken by their weights, for a scale of 1.

    The matrix is taken as it is in the model. In `bridge.processed()` norms' weights are part of it, and its singular
    vectors are others. Random directions have strongest tokens too: whether a list means something is a judgement.

    Args:
        bridge: The model.
        matrix: Which matrix.
        layer: Of which layer.
        head: Of which head, for `"OV"` alone.
        k: How many singular vectors.
        tokens: How many tokens at each end.

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
        between, the reading side meets embeddings, and both ends are shown.
    """
    _check_place(bridge, matrix, layer, head)
    U, values, Vh = _svd(bridge, matrix, layer, head)
    _check_count("k", k, len(values))
    left, right = U[:, :k].T, Vh[:k]
    reads = None if matrix == "W_out" else _read(bridge, left, layer, from_mlp=matrix != "OV")
    writes = None if matrix in ("W_in", "W_gate") else _written(bridge, right, layer, from_mlp=matrix != "OV")
    shown = writes if writes is not None else reads
    assert shown is not None, "every matrix reads or writes the residual stream"
    # The end with the stronger token is `+`, so that the sign does not depend on how the decomposition was computed.
    sign = torch.where(shown.amax(-1) < -shown.amin(-1), -1.0, 1.0)[:, None]
    reading, writing = (None if scores is None else _ends(scores * sign, tokens) for scores in (reads, writes))
    shares = values.square() / values.square().sum()
    ids = [side.ids for side in (reading, writing) if side is not None]
    return SingularReadings(
        matrix, layer, head, values[:k].cpu(), shares[:k].cpu(), reading, writing, words_of(bridge, *ids)
    )


def _svd(bridge: TransformerBridge, matrix: ReadableMatrix, layer: int, head: int | None) -> SVD:
    """Returns the decomposition of a matrix that multiplies a row from the right, in float32 at least."""
    attn, mlp = bridge.blocks[layer].attn, bridge.blocks[layer].mlp
    match matrix:
        case "OV":
            assert head is not None, "checked before"
            return FactoredMatrix(bridge.expand_kv_heads(attn.W_V)[head], attn.W_O[head]).svd()
        case "W_in":
            weight = mlp.W_in
        case "W_gate":
            weight = mlp.W_gate
        case "W_out":
            weight = mlp.W_out
    return SVD(*torch.linalg.svd(exact(weight), full_matrices=False))


def _read(
    bridge: TransformerBridge, vectors: Float[Tensor, "value d_model"], layer: int, *, from_mlp: bool
) -> Float[Tensor, "value d_vocab"]:
    """Returns how strongly each token's embedding, through the norm that a sublayer reads through, excites vectors."""
    norm = norm_at(bridge, layer, mlp_input=from_mlp)
    along = vectors if norm is None else weighted(norm, vectors)
    scores = []
    for ids in torch.arange(bridge.embed.n_tokens, device=bridge.device).split(_ROWS):
        rows = ids[:, None]
        _, cache = bridge.run_with_cache(rows, "hook_embed", attention_mask=torch.ones_like(rows), stop_at_layer=0)
        embedded = exact(cache["hook_embed"][:, 0])
        scores.append((embedded if norm is None else norm.normalize(embedded)) @ along.T)
    return torch.cat(scores).T


def _written(
    bridge: TransformerBridge, vectors: Float[Tensor, "value d_model"], layer: int, *, from_mlp: bool
) -> Float[Tensor, "value d_vocab"]:
    """Returns the logits that vectors in a sublayer's output add, for a scale of 1 of the norms after it."""
    block = bridge.blocks[layer]
    norm = block.submodules.get("ln2_post" if from_mlp else "ln1_post")
    if isinstance(norm, NormalizationBridge):
        vectors = weighted(norm, centred(norm, vectors))
    return logits_of(bridge, vectors * block.residual_multiplier)


def _ends(scores: Float[Tensor, "value d_vocab"], tokens: int) -> VocabularySide:
    _check_count("tokens", tokens, scores.shape[1])
    strongest = torch.stack([scores, -scores], dim=1).topk(tokens)
    return VocabularySide(strongest.indices.cpu(), strongest.values.cpu())


def _check_count(name: str, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise InvalidArgumentError(f"{name}={count} cannot be shown", expected=f"1 to {most}")


def _check_place(bridge: TransformerBridge, matrix: ReadableMatrix, layer: int, head: int | None) -> None:
    """Raises unless the matrix is there."""
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    if matrix not in get_args(ReadableMatrix):
        raise InvalidArgumentError(f"unknown matrix {matrix!r}", expected="'OV', 'W_in', 'W_gate' or 'W_out'")
    if not 0 <= layer < n_layers:
        raise InvalidArgumentError(f"there is no layer {layer}", expected=f"0 to {n_layers - 1}", got=str(layer))
    if matrix != "OV" and head is not None:
        raise InvalidArgumentError(f"{matrix} is the whole MLP's", expected="head=None", got=f"head={head}")
    if matrix == "OV" and (head is None or not 0 <= head < n_heads):
        raise InvalidArgumentError("OV is one head's", expected=f"head=0 to {n_heads - 1}", got=f"head={head}")
