"""The models that everything is measured on: random weights, made in the process, and where their parts are.

`gpt-bigcode` has 12 layers in float32; `llama` has 16 layers in bfloat16, and 4 query heads to a key-value head.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention, GPTBigCodeBlock, GPTBigCodeMLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

Model = GPTBigCodeForCausalLM | LlamaForCausalLM

LAYERS = 12
"""Of GPTBigCode."""
VOCABULARY = 8192
WIDTHS: Mapping[str, int] = {"gpt-bigcode": 768, "llama": 2048}
"""d_model of each model where nothing else is said."""
TINY_LAYERS, TINY_WIDTH = 2, 64


@dataclass(frozen=True)
class Reference:
    """A model, and where the parts are that loops written by hand reach into.

    Attributes:
        model: The model.
        blocks: Its blocks.
        projections: Each block's projection of the heads' outputs, whose input holds them one after the other.
        norm: The norm before the unembedding.
        kept: The kinds of module whose inputs and outputs clearspan's cache keeps.
    """

    model: Model
    blocks: Sequence[nn.Module]
    projections: Sequence[nn.Module]
    norm: nn.Module
    kept: tuple[type[nn.Module], ...]

    @classmethod
    def of(cls, model: Model) -> "Reference":
        """Returns a model with its parts."""
        always = (nn.Linear, nn.Embedding)
        match model:
            case GPTBigCodeForCausalLM():
                blocks = [block for block in model.transformer.h if isinstance(block, GPTBigCodeBlock)]
                outputs = [block.attn.c_proj for block in blocks]
                kept = (*always, nn.LayerNorm, GPTBigCodeAttention, GPTBigCodeMLP, GPTBigCodeBlock)
                return cls(model, blocks, outputs, model.transformer.ln_f, kept)
            case LlamaForCausalLM():
                layers = [layer for layer in model.model.layers if isinstance(layer, LlamaDecoderLayer)]
                outputs = [layer.self_attn.o_proj for layer in layers]
                kept = (*always, LlamaRMSNorm, LlamaAttention, LlamaMLP, LlamaDecoderLayer)
                return cls(model, layers, outputs, model.model.norm, kept)

    @property
    def layers(self) -> int:
        """How many blocks."""
        return len(self.blocks)

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.model.config.num_attention_heads or 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def tokens(self, batch: int, length: int, seed: int = 0) -> Int[Tensor, "batch pos"]:
        """Returns `random_tokens` on the model's device."""
        return random_tokens(batch, length, seed).to(self.device)

    def keywords(self, stream: Float[Tensor, "row pos d_model"], first: int, prefix: Any) -> dict[str, Any]:
        """Returns what a block is called with besides the residual stream.

        Args:
            stream: The residual stream, whose sequences start at a position.
            first: That position.
            prefix: The cache of the keys and values before it, or None where there are none.
        """
        new = stream.shape[1]
        sees = None
        if prefix is not None:
            sees = torch.ones(new, first + new, dtype=torch.bool, device=stream.device).tril(first)[None, None]
        found: dict[str, Any] = {"attention_mask": sees, "use_cache": prefix is not None}
        match self.model:
            case GPTBigCodeForCausalLM():
                return {**found, "layer_past": prefix}
            case LlamaForCausalLM(model=inner):
                positions = torch.arange(first, first + new, device=stream.device)[None]
                return {**found, "past_key_values": prefix, "position_embeddings": inner.rotary_emb(stream, positions)}


def gpt_bigcode(d_model: int, layers: int) -> GPTBigCodeForCausalLM:
    """Returns a GPTBigCode with heads of width 64, at least 4 of them."""
    config = GPTBigCodeConfig(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=d_model,
        n_layer=layers,
        n_head=max(4, d_model // 64),
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTBigCodeForCausalLM(config)


def llama(d_model: int, layers: int) -> LlamaForCausalLM:
    """Returns a Llama with heads of width 64, at least 4 of them, in bfloat16."""
    heads = max(4, d_model // 64)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    return LlamaForCausalLM._from_config(config)


def build(name: str, d_model: int | None = None, layers: int | None = None, device: str = "cpu") -> Reference:
    """Returns a model of `WIDTHS` on a device, by default of its full width and depth."""
    torch.manual_seed(0)
    width = d_model or WIDTHS[name]
    with torch.device(device):
        model = gpt_bigcode(width, layers or LAYERS) if name == "gpt-bigcode" else llama(width, layers or 16)
    return Reference.of(model.eval())


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a model to a parser."""
    parser.add_argument("--model", choices=WIDTHS, default="gpt-bigcode")
    parser.add_argument("--tiny", action="store_true", help=f"{TINY_LAYERS} layers of width {TINY_WIDTH}: to try")


def build_chosen(options: argparse.Namespace, d_model: int | None = None) -> Reference:
    """Returns the model that options choose, of a width where it is not tiny."""
    size = (TINY_WIDTH, TINY_LAYERS) if options.tiny else (d_model, None)
    return build(options.model, *size, device=options.device)


def random_tokens(batch: int, length: int, seed: int = 0) -> Int[Tensor, "batch pos"]:
    """Returns token ids, none of them the special one: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def save(model: Model, folder: str) -> None:
    """Writes a model to a folder, with a tokenizer of a word for each id, which some libraries need."""
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({str(index): index for index in range(VOCABULARY)}, unk_token="0"))
    special = {"bos_token": "0", "eos_token": "0", "pad_token": "0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
