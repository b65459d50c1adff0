"""The model that everything is measured on: GPTBigCode with random weights, made in the process."""

from typing import cast

import torch
import transformers
from jaxtyping import Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeBlock

LAYERS = 12
VOCABULARY = 8192


def build(d_model: int) -> GPTBigCodeForCausalLM:
    """Returns the model with 12 layers, and heads of width 64, of which there are 4 at the least."""
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=d_model,
        n_layer=LAYERS,
        n_head=max(4, d_model // 64),
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTBigCodeForCausalLM(config).eval()


def blocks_of(model: GPTBigCodeForCausalLM) -> list[GPTBigCodeBlock]:
    """Returns its blocks."""
    return cast("list[GPTBigCodeBlock]", list(model.transformer.h))


def random_tokens(batch: int, length: int, seed: int = 0) -> Int[Tensor, "batch pos"]:
    """Returns token ids, none of them the special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def save(model: GPTBigCodeForCausalLM, folder: str) -> None:
    """Writes a model to a folder, with a tokenizer of a word for each id, which some libraries need."""
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({str(index): index for index in range(VOCABULARY)}, unk_token="0"))
    special = {"bos_token": "0", "eos_token": "0", "pad_token": "0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
