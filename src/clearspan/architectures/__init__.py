"""One adapter per family of architectures, what makes them of parts, and the registry of them."""

from clearspan.architectures import parts
from clearspan.architectures.adapter import AdapterSource, ArchitectureAdapter, Sizes, entries, name_of
from clearspan.architectures.gpt_bigcode import GPTBigCodeArchitectureAdapter, MQAQKVConversionRule
from clearspan.architectures.implied import implied
from clearspan.architectures.registry import ADAPTERS, Registration, adapter_class, check_source, find_adapter, register

__all__ = [
    "ADAPTERS",
    "AdapterSource",
    "ArchitectureAdapter",
    "GPTBigCodeArchitectureAdapter",
    "MQAQKVConversionRule",
    "Registration",
    "Sizes",
    "adapter_class",
    "check_source",
    "entries",
    "find_adapter",
    "implied",
    "name_of",
    "parts",
    "register",
]
