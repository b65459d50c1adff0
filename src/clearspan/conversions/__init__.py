"""Invertible tensor conversions between Hugging Face's layouts and canonical axes. They know no model."""

from clearspan.conversions.layouts import HalfConversion as HalfConversion
from clearspan.conversions.layouts import HeadPartConversion as HeadPartConversion
from clearspan.conversions.layouts import HeadsConversion as HeadsConversion
from clearspan.conversions.layouts import ScaledConversion as ScaledConversion
from clearspan.conversions.layouts import BaseTensorConversion as BaseTensorConversion
from clearspan.conversions.layouts import ParamProcessingConversion as ParamProcessingConversion
from clearspan.conversions.qkv import BlockedQKVConversionRule as BlockedQKVConversionRule
from clearspan.conversions.qkv import GroupedQKVConversionRule as GroupedQKVConversionRule
from clearspan.conversions.qkv import QKVConversionRule as QKVConversionRule
from clearspan.conversions.qkv import QKVPartConversion as QKVPartConversion
from clearspan.conversions.layouts import RearrangeTensorConversion as RearrangeTensorConversion
