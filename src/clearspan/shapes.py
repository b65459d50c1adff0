"""The one vocabulary of axes, and the sizes that a model gives them."""

from collections.abc import Mapping

from clearspan.config import TransformerBridgeConfig

Axes = tuple[str, ...]

AXES: dict[str, str] = {
    "batch": "rows of the input",
    "pos": "token positions",
    "q_pos": "positions that attend",
    "k_pos": "positions attended to (with a KV cache: all of them)",
    "head": "query heads",
    "kv_head": "key and value heads",
    "d_model": "width of the residual stream",
    "d_head": "width of a head",
    "d_head_qk": "width of a head's queries and keys, where it is not that of its values",
    "d_head_v": "width of a head's values, where it is not that of its queries and keys",
    "qk_head": "heads of a mixer's queries and keys, where several heads share them",
    "group": "groups of heads of a mixer that share its B and C",
    "d_inner": "width of a mixer, which its output projection reads",
    "state": "channels of the state that a state space keeps for each of its inputs",
    "d_mlp": "width of the MLP's hidden layer",
    "d_vocab": "vocabulary",
    "expert": "experts of a mixture",
    "k": "experts chosen for a token",
    "feature": "features of a sparse autoencoder",
    "stream": "residual streams, of models that have several",
    "to_stream": "residual streams that others are mixed into",
    "1": "one",
    "width": "width of a part, such as a fused projection",
}
"""Every axis, and what it counts."""


def axes(names: str) -> Axes:
    """Returns the axes of a space-separated list, each of which must be in the vocabulary.

    Example:
        >>> axes("batch pos d_model")
        ('batch', 'pos', 'd_model')
    """
    parsed = tuple(names.split())
    unknown = [name for name in parsed if name not in AXES]
    assert not unknown, f"axes outside the vocabulary: {unknown}"
    return parsed


def with_sizes(axes: Axes, sizes: Mapping[str, int | None]) -> str:
    """Returns axes as text, with those sizes that are known.

    Example:
        >>> with_sizes(("batch", "pos", "d_model"), {"d_model": 64})
        '[batch, pos, d_model=64]'
    """
    known = ((axis, sizes.get(axis)) for axis in axes)
    return f"[{', '.join(axis if size is None or axis == str(size) else f'{axis}={size}' for axis, size in known)}]"


def sizes(cfg: TransformerBridgeConfig) -> dict[str, int]:
    """Returns the size of each axis that the model fixes (batch and positions are the input's)."""
    return {
        "head": cfg.n_heads,
        "kv_head": cfg.n_key_value_heads or cfg.n_heads,
        "d_model": cfg.d_model,
        "d_head": cfg.d_head,
        "d_mlp": cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
        "1": 1,
    }
