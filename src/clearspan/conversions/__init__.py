"""Invertible tensor conversions between Hugging Face's layouts and canonical axes. They know no model."""

from clearspan.conversions.activations import HalfConversion, HeadPartConversion, HeadsConversion, ScaledConversion
from clearspan.conversions.base import BaseTensorConversion
from clearspan.conversions.param import ParamProcessingConversion
from clearspan.conversions.qkv import (
    BlockedQKVConversionRule,
    GroupedQKVConversionRule,
    QKVConversionRule,
    QKVPartConversion,
)
from clearspan.conversions.rearrange import RearrangeTensorConversion

__all__ = [
    "BaseTensorConversion",
    "BlockedQKVConversionRule",
    "GroupedQKVConversionRule",
    "HalfConversion",
    "HeadPartConversion",
    "HeadsConversion",
    "ParamProcessingConversion",
    "QKVConversionRule",
    "QKVPartConversion",
    "RearrangeTensorConversion",
    "ScaledConversion",
]
