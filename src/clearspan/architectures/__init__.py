"""One adapter per family of architectures, and the registry of them."""

from clearspan.architectures.decoder import ArchitectureAdapter
from clearspan.architectures.gpt_bigcode import GPTBigCodeArchitectureAdapter, MQAQKVConversionRule
from clearspan.architectures.registry import ADAPTERS, adapter_class

__all__ = ["ADAPTERS", "ArchitectureAdapter", "GPTBigCodeArchitectureAdapter", "MQAQKVConversionRule", "adapter_class"]
