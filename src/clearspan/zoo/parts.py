"""What a model is made of, in a few words: the kinds of its parts, as its bridge names them."""

from collections.abc import Iterator

from clearspan.bridge import TransformerBridge
from clearspan.components import GeneralAttentionBridge, GeneralizedComponent


def parts_of(bridge: TransformerBridge) -> dict[str, str]:
    """Returns the kinds of a model's parts.

    Returns:
        By the name of a sublayer, the kinds that its layers have, `norms` and `positions`.

    Example:
        >>> import clearspan
        >>> clearspan.zoo.parts_of(clearspan.boot("tiny-bigcode"))
        {'positions': 'standard', 'norms': 'ln1, ln2', 'attn': 'JointQKVAttention, multi-query', 'mlp': 'MLP'}
    """
    norms: dict[str, None] = {}
    kinds: dict[str, dict[str, None]] = {}
    for block in bridge.blocks:
        for name, part in block.submodules.items():
            if name.startswith("ln"):
                norms[name] = None
            else:
                kinds.setdefault(name, {})[", ".join(_said(part))] = None
    positions = str(bridge.cfg.positional_embedding_type)
    return {
        "positions": positions,
        "norms": ", ".join(norms),
        **{name: " / ".join(found) for name, found in kinds.items()},
    }


def _said(part: GeneralizedComponent) -> Iterator[str]:
    """Yields a part's kind, and what else sets it apart."""
    yield type(part).__name__.removesuffix("Bridge")
    if isinstance(part, GeneralAttentionBridge):
        if part.n_kv_heads != part.n_heads:
            yield "grouped" if part.n_kv_heads > 1 else "multi-query"
        if "q_norm" in part.submodules:
            yield "query and key norms"
        if part.has_sinks:
            yield "sinks"
