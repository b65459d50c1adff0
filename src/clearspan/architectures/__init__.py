"""One adapter per family of architectures, and the registry of them."""

from clearspan.architectures.decoder import ArchitectureAdapter as ArchitectureAdapter
from clearspan.architectures.gpt_bigcode import GPTBigCodeArchitectureAdapter as GPTBigCodeArchitectureAdapter
from clearspan.architectures.gpt_bigcode import MQAQKVConversionRule as MQAQKVConversionRule
from clearspan.architectures.registry import ADAPTERS as ADAPTERS
from clearspan.architectures.registry import adapter_class as adapter_class
