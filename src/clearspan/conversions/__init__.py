"""Invertible tensor conversions between Hugging Face's layouts and canonical axes. They know no model."""

from clearspan.conversions.base import BaseTensorConversion as BaseTensorConversion
from clearspan.conversions.heads import HeadsConversion as HeadsConversion
from clearspan.conversions.param import ParamProcessingConversion as ParamProcessingConversion
from clearspan.conversions.qkv import InterleavedQKVConversionRule as InterleavedQKVConversionRule
from clearspan.conversions.qkv import QKVConversionRule as QKVConversionRule
from clearspan.conversions.qkv import QKVPartConversion as QKVPartConversion
from clearspan.conversions.rearrange import RearrangeTensorConversion as RearrangeTensorConversion
