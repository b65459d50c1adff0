"""Invertible tensor conversions between Hugging Face's layouts and canonical axes. They know no model."""

from clearspan.conversions.activations import HalfConversion as HalfConversion
from clearspan.conversions.activations import HeadPartConversion as HeadPartConversion
from clearspan.conversions.activations import HeadsConversion as HeadsConversion
from clearspan.conversions.activations import ScaledConversion as ScaledConversion
from clearspan.conversions.base import BaseTensorConversion as BaseTensorConversion
from clearspan.conversions.param import ParamProcessingConversion as ParamProcessingConversion
from clearspan.conversions.qkv import BlockedQKVConversionRule as BlockedQKVConversionRule
from clearspan.conversions.qkv import GroupedQKVConversionRule as GroupedQKVConversionRule
from clearspan.conversions.qkv import QKVConversionRule as QKVConversionRule
from clearspan.conversions.qkv import QKVPartConversion as QKVPartConversion
from clearspan.conversions.rearrange import RearrangeTensorConversion as RearrangeTensorConversion
