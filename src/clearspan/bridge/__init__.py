"""The bridge: boot, forward, hooks, cache, generation. Each module does one of these; the class names them."""

from clearspan.bridge.boot import boot as boot
from clearspan.bridge.cache import ActivationCache as ActivationCache
from clearspan.bridge.transformer_bridge import TransformerBridge as TransformerBridge

ActivationCache.__module__ = TransformerBridge.__module__ = "clearspan"
