"""What follows from an adapter's mapping: fields of the sizes, and the conversions of attention's weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from clearspan.components import (
    AttentionBridge,
    BlockBridge,
    GatedMLPBridge,
    GeneralAttentionBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    LatentAttentionBridge,
    MoEBridge,
    NormalizationBridge,
    OpaqueAttentionBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import ParamProcessingConversion, RearrangeTensorConversion

Parts = Mapping[str, GeneralizedComponent]


def layers_of(mapping: Parts, n_layers: int) -> list[GeneralizedComponent]:
    """Returns the templates of all layers' blocks.

    Raises:
        AdapterError: A part that differs from layer to layer does not have them all.
    """
    blocks = mapping.get("blocks")
    if blocks is None or not blocks.is_of(BlockBridge):
        return []
    return [blocks.at_layer(layer) for layer in range(n_layers)]


def implied(frame: Parts, layers: Sequence[GeneralizedComponent], cfg: TransformerBridgeConfig) -> dict[str, object]:
    """Returns the fields of the sizes that parts imply; of templates or of live parts.

    Args:
        frame: The parts outside the blocks, by canonical name.
        layers: The block of each layer.
        cfg: The model's sizes, for what parts leave to it.
    """
    mlps = [layer.submodules["mlp"] for layer in layers if "mlp" in layer.submodules]
    return {
        "gated_mlp": any(isinstance(mlp, GatedMLPBridge | MoEBridge) for mlp in mlps),
        "attn_only": bool(layers) and not mlps,
        **dict(_of_norms(frame, layers)),
        **dict(_of_attention([part for layer in layers for part in _attentions(layer)], cfg)),
        "positional_embedding_type": _positions(layers, frame),
        **dict(_of_logits(frame.get("unembed"))),
    }


def _of_logits(unembed: GeneralizedComponent | None) -> Iterator[tuple[str, object]]:
    if isinstance(unembed, UnembeddingBridge):
        yield "logit_scale", unembed.scale
        yield "output_logits_soft_cap", unembed.softcap


def _of_norms(frame: Parts, layers: Iterable[GeneralizedComponent]) -> Iterator[tuple[str, object]]:
    """Yields what norms of the residual stream imply, if it is known of each which kind it is."""
    last = frame.get("ln_final")
    norms = [
        part
        for parts in (frame, *(layer.submodules for layer in layers))
        for key, part in parts.items()
        if key.startswith("ln") and isinstance(part, NormalizationBridge)
    ]
    if all(norm.uses_rms_norm is not None for norm in norms):
        uses_rms = any(norm.uses_rms_norm for norm in norms)
        yield "uses_rms_norm", uses_rms
        yield "normalization_type", "RMS" if uses_rms else "LN"
        yield "final_rms", isinstance(last, NormalizationBridge) and bool(last.uses_rms_norm)


def _attentions(layer: GeneralizedComponent) -> Iterator[GeneralAttentionBridge]:
    return (part for part in layer.submodules.values() if isinstance(part, GeneralAttentionBridge))


def _positions(layers: Sequence[GeneralizedComponent], frame: Parts) -> str:
    """Returns how positions come in."""
    found = [part for layer in layers for part in _attentions(layer)]
    parts = (part for layer in layers for part in layer.submodules.values())
    opaque = (part.has_rotary for part in parts if isinstance(part, OpaqueAttentionBridge))
    embeddings = [part for part in frame.values() if isinstance(part, PosEmbedBridge)]
    kinds = {
        "rotary": any(attention.has_rotary for attention in found) or any(opaque),
        "alibi": any(attention.has_alibi for attention in found),
        "standard": any(embedding.table is not None for embedding in embeddings),
        "sinusoidal": bool(embeddings),
        "none": True,
    }
    return next(kind for kind, is_there in kinds.items() if is_there)


def _of_attention(
    found: Sequence[GeneralAttentionBridge], cfg: TransformerBridgeConfig
) -> Iterator[tuple[str, object]]:
    """Yields what attention implies of its heads."""
    match next(iter(found), None):
        case JointQKVAttentionBridge(qkv_conversion_rule=rule):
            yield "n_key_value_heads", rule.n_kv_heads
        case LatentAttentionBridge(d_head_nope=nope, d_head_rope=rope):
            yield "d_head", nope + rope
            yield "n_key_value_heads", cfg.n_heads  # each head has a key and a value of its own, made of the latent one
        case GeneralAttentionBridge():
            yield "n_key_value_heads", cfg.n_key_value_heads or cfg.n_heads
        case _:
            pass
    splits = bool(found) and all(
        isinstance(attention, JointQKVAttentionBridge) and attention.split_qkv_matrix is not None for attention in found
    )
    yield "uses_split_attention", splits
    yield "split_attention_weights", splits


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_conversions(
    layers: Sequence[GeneralizedComponent], cfg: TransformerBridgeConfig
) -> dict[str, ParamProcessingConversion]:
    """Returns the conversions of attention's weights by canonical name, as the layout of each attention says.

    Names have `{i}` for the layer where all layers convert in the same way, and otherwise the layer's number.
    """
    found: dict[str, dict[str, RearrangeTensorConversion]] = {}
    for index, layer in enumerate(layers):
        for key, part in layer.submodules.items():
            if isinstance(part, GeneralAttentionBridge):
                for letter, conversion in _conversions(part, cfg).items():
                    found.setdefault(f"{key}.{letter}.weight", {})[str(index)] = conversion
    return {
        f"blocks.{layer}.{name}": ParamProcessingConversion(conversion)
        for name, by_layer in found.items()
        for layer, conversion in _joined(by_layer).items()
    }


def _joined(by_layer: dict[str, RearrangeTensorConversion]) -> dict[str, RearrangeTensorConversion]:
    first, *others = by_layer.values()
    return {"{i}": first} if all(repr(other) == repr(first) for other in others) else by_layer


def _conversions(
    attention: GeneralAttentionBridge, cfg: TransformerBridgeConfig
) -> dict[str, RearrangeTensorConversion]:
    n_kv_heads = cfg.n_key_value_heads or cfg.n_heads
    match attention:
        case JointQKVAttentionBridge(qkv_conversion_rule=rule):
            inward = {part: rule.weight(part) for part in ("q", "k", "v")}
        case AttentionBridge():
            heads = {"q": cfg.n_heads, "k": n_kv_heads, "v": n_kv_heads}
            inward = {part: RearrangeTensorConversion("(n h) m -> n m h", n=n) for part, n in heads.items()}
        case _:
            inward = {}
    return {**inward, "o": RearrangeTensorConversion("m (n h) -> n h m", n=cfg.n_heads)}
