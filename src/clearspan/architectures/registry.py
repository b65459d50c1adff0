"""Which adapter serves which architecture."""

from clearspan.architectures.alibi import BloomArchitectureAdapter, MPTArchitectureAdapter
from clearspan.architectures.decoder import ArchitectureAdapter
from clearspan.architectures.falcon import FalconArchitectureAdapter
from clearspan.architectures.gpt import (
    GPT2ArchitectureAdapter,
    GPTJArchitectureAdapter,
    GPTNeoXArchitectureAdapter,
)
from clearspan.architectures.gpt_bigcode import GPTBigCodeArchitectureAdapter
from clearspan.architectures.llama import (
    Cohere2ArchitectureAdapter,
    Gemma2ArchitectureAdapter,
    Gemma3ArchitectureAdapter,
    GraniteArchitectureAdapter,
    LlamaArchitectureAdapter,
    MistralArchitectureAdapter,
    Olmo2ArchitectureAdapter,
    Phi3ArchitectureAdapter,
    Qwen2ArchitectureAdapter,
    Qwen3ArchitectureAdapter,
)
from clearspan.architectures.mixtures import (
    DeepseekV3ArchitectureAdapter,
    GptOssArchitectureAdapter,
    MixtralArchitectureAdapter,
    Qwen3MoeArchitectureAdapter,
)
from clearspan.architectures.opt import OPTArchitectureAdapter
from clearspan.errors import UnsupportedArchitectureError
from clearspan.points import nearest

ADAPTERS: dict[str, type[ArchitectureAdapter]] = {
    "BloomForCausalLM": BloomArchitectureAdapter,
    "Cohere2ForCausalLM": Cohere2ArchitectureAdapter,
    "DeepseekV3ForCausalLM": DeepseekV3ArchitectureAdapter,
    "FalconForCausalLM": FalconArchitectureAdapter,
    "GPT2LMHeadModel": GPT2ArchitectureAdapter,
    "GPTBigCodeForCausalLM": GPTBigCodeArchitectureAdapter,
    "GPTJForCausalLM": GPTJArchitectureAdapter,
    "GPTNeoXForCausalLM": GPTNeoXArchitectureAdapter,
    "Gemma2ForCausalLM": Gemma2ArchitectureAdapter,
    "Gemma3ForCausalLM": Gemma3ArchitectureAdapter,
    "GptOssForCausalLM": GptOssArchitectureAdapter,
    "GraniteForCausalLM": GraniteArchitectureAdapter,
    "LlamaForCausalLM": LlamaArchitectureAdapter,
    "MistralForCausalLM": MistralArchitectureAdapter,
    "MixtralForCausalLM": MixtralArchitectureAdapter,
    "MptForCausalLM": MPTArchitectureAdapter,
    "OPTForCausalLM": OPTArchitectureAdapter,
    "Olmo2ForCausalLM": Olmo2ArchitectureAdapter,
    "Phi3ForCausalLM": Phi3ArchitectureAdapter,
    "Qwen2ForCausalLM": Qwen2ArchitectureAdapter,
    "Qwen3ForCausalLM": Qwen3ArchitectureAdapter,
    "Qwen3MoeForCausalLM": Qwen3MoeArchitectureAdapter,
}


def adapter_class(architecture: str) -> type[ArchitectureAdapter]:
    """Returns the adapter of a Hugging Face model class.

    Raises:
        UnsupportedArchitectureError: There is none.
    """
    if architecture not in ADAPTERS:
        raise UnsupportedArchitectureError(
            f"no adapter for {architecture}",
            expected=", ".join(sorted(ADAPTERS)),
            nearest=nearest(architecture, ADAPTERS),
            fix="write an adapter: CONTRIBUTING.md shows how, step by step",
        )
    return ADAPTERS[architecture]
