"""See through any Hugging Face transformer and reach into it, under one set of names, without changing the model.

The public names are loaded when first used, so that the command line answers without loading torch.

Example:
    >>> import clearspan
    >>> bridge = clearspan.boot("tiny-bigcode")
    >>> logits, cache = bridge.run_with_cache("def area(self):")
    >>> cache["pattern", 2].shape[1] == bridge.cfg.n_heads
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clearspan.bridge import TransformerBridge as TransformerBridge
    from clearspan.bridge import boot as boot
    from clearspan.cache import ActivationCache as ActivationCache
    from clearspan.errors import ClearspanError as ClearspanError
    from clearspan.interventions import Intervention as Intervention
    from clearspan.interventions import register_function as register_function
    from clearspan.points import HookPoint as HookPoint
    from clearspan.points import get_act_name as get_act_name
    from clearspan.sweep import Sweep as Sweep
    from clearspan.sweep import grid as grid

__version__ = "0.1.0"

_HOMES = {
    "ActivationCache": "clearspan.cache",
    "ClearspanError": "clearspan.errors",
    "HookPoint": "clearspan.points",
    "Intervention": "clearspan.interventions",
    "Sweep": "clearspan.sweep",
    "TransformerBridge": "clearspan.bridge",
    "boot": "clearspan.bridge",
    "get_act_name": "clearspan.points",
    "grid": "clearspan.sweep",
    "register_function": "clearspan.interventions",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'clearspan' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
