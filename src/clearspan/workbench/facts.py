"""Facts of the model that the page shows without a run: sizes, hook points, and text as tokens."""

from typing import Any

from clearspan.bridge import TransformerBridge


def model_facts(bridge: TransformerBridge) -> dict[str, Any]:
    """Returns the model's name and sizes, and its hook points, each with its shape."""
    cfg = bridge.cfg
    return {
        "name": cfg.model_name,
        "architecture": cfg.architecture,
        "parameters": sum(one.numel() for one in bridge.parameters()),
        "layers": cfg.n_layers,
        "heads": cfg.n_heads,
        "width": cfg.d_model,
        "context": cfg.n_ctx,
        "vocabulary": cfg.d_vocab,
        "attention_layers": bridge.layers_with("attn"),
        "has_tokenizer": bridge.tokenizer is not None,
        "points": [{"name": row.name, "shape": row.shape} for row in bridge.points()],
    }


def read_tokens(bridge: TransformerBridge, text: str) -> dict[str, Any]:
    """Returns a text's token ids, as the model reads them, and how each is written.

    Without a tokenizer the text is ids, with commas or spaces between them.
    """
    parts = text.replace(",", " ").split()
    is_ids = bridge.tokenizer is None and all(part.isascii() and part.isdigit() for part in parts)
    batch = bridge.to_batch([[int(part) for part in parts]] if is_ids and parts else text)
    tokens = batch.ids[0].tolist()
    return {"text": text, "tokens": tokens, "labels": [bridge.text.label(token) for token in tokens]}
