"""What the comparisons with TransformerLens share: tiny random models that both libraries load, and errors."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

TOLERANCE = 5e-6
"""Of the largest difference over the largest value. Values taken as equal differ by 9.8e-7 at most, as measured."""

MASKED = torch.finfo(torch.float32).max / 2
"""Scores whose size is above this are masked, and do not count as the largest value."""

IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 97}
GPT: dict[str, Any] = {**IDS, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}
LLAMA: dict[str, Any] = {
    **IDS,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "GPTBigCode, multi-query": lambda: transformers.GPTBigCodeConfig(**GPT),
    "GPT-2": lambda: transformers.GPT2Config(**GPT),
    "Llama, two key/value heads": lambda: transformers.LlamaConfig(**LLAMA),
}


def save(config: transformers.PreTrainedConfig, folder: str) -> None:
    """Writes a model whose weights, biases and norms are all random, and a tokenizer, which TransformerLens needs.

    The tokens are `<s>`, and the numbers from 1 to 96, with white space between them.
    """
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.25 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<s>": 0, **{str(index): index for index in range(1, 97)}}, unk_token="<s>"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest difference over the largest value that is not masked; masked entries must be identical."""
    if not ours.numel():
        return 0.0
    a, b = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (ours, theirs))
    are_equal = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(are_equal, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    size = a.abs().nan_to_num(nan=0.0)
    return (gap.max() / size[size < MASKED].max()).item() if gap.any() else 0.0
