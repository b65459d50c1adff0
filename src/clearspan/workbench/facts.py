"""Facts of the model that the page shows without a run: sizes, hook points, and text as tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_fields, check_kind
from clearspan.workbench.views import Prompt


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


def read_prompt(bridge: TransformerBridge, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a text and its token ids, as the model reads them, and how each is written.

    Args:
        bridge: The model.
        given: `text`; or `tokens`, whose text is read anew. Without a tokenizer a text is ids, with commas or spaces
            between them.

    Raises:
        InvalidArgumentError: It is neither.
        InputError: The text cannot be read.
    """
    if isinstance(given, Mapping) and "tokens" in given:
        text = _text_of(bridge, Prompt(given["tokens"]).tokens)
    else:
        check_fields("text", given, "text")
        text = given["text"]
        check_kind(str, text=text)
    parts = text.replace(",", " ").split()
    is_ids = bridge.tokenizer is None and bool(parts) and all(part.isascii() and part.isdigit() for part in parts)
    tokens = bridge.to_batch([[int(part) for part in parts]] if is_ids else text).ids[0].tolist()
    return {"text": text, "tokens": tokens, "labels": [bridge.text.label(token) for token in tokens]}


def _text_of(bridge: TransformerBridge, tokens: Sequence[int]) -> str:
    """Returns the text that is read as these tokens: without the BOS that every text gets."""
    if bridge.tokenizer is None:
        return ", ".join(map(str, tokens))
    is_begun = len(tokens) > 1 and tokens[0] == bridge.tokenizer.bos_token_id and bridge.cfg.default_prepend_bos
    return str(bridge.to_string(list(tokens[1:] if is_begun else tokens)))
