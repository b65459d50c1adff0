"""Invertible tensor conversions between Hugging Face's layouts and canonical axes. They know no model."""

from clearspan.conversions.gates import GateActivation, GateConversion
from clearspan.conversions.layouts import (
    BaseTensorConversion,
    ChainedConversion,
    ChannelsConversion,
    HalfConversion,
    HeadPartConversion,
    HeadsConversion,
    ParamProcessingConversion,
    RearrangeTensorConversion,
    ScaledConversion,
    ShiftedConversion,
)
from clearspan.conversions.qkv import (
    BlockedQKVConversionRule,
    GroupedQKVConversionRule,
    QKVConversionRule,
    QKVPartConversion,
    SlicedQKVConversionRule,
)

__all__ = [
    "BaseTensorConversion",
    "BlockedQKVConversionRule",
    "ChainedConversion",
    "ChannelsConversion",
    "GateActivation",
    "GateConversion",
    "GroupedQKVConversionRule",
    "HalfConversion",
    "HeadPartConversion",
    "HeadsConversion",
    "ParamProcessingConversion",
    "QKVConversionRule",
    "SlicedQKVConversionRule",
    "QKVPartConversion",
    "RearrangeTensorConversion",
    "ScaledConversion",
    "ShiftedConversion",
]
