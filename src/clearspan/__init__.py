"""See through any Hugging Face transformer and reach into it, under one set of names, without changing the model.

The public names and modules are loaded when they are first used, so that the command line answers without loading
torch.

Example:
    >>> import clearspan
    >>> bridge = clearspan.boot("tiny-bigcode")
    >>> logits, cache = bridge.run_with_cache("def area(self):")
    >>> cache["pattern", 2].shape[1] == bridge.cfg.n_heads
    True
    >>> bool(clearspan.analysis.head_scores(bridge).induction.max() > 0.9)
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clearspan import analysis as analysis
    from clearspan import architectures as architectures
    from clearspan import circuits as circuits
    from clearspan import components as components
    from clearspan import conversions as conversions
    from clearspan import errors as errors
    from clearspan import interventions as interventions
    from clearspan import patching as patching
    from clearspan import sweep as sweep
    from clearspan import transfers as transfers
    from clearspan import weights as weights
    from clearspan import zoo as zoo
    from clearspan.architectures import register as register
    from clearspan.bridge import TransformerBridge as TransformerBridge
    from clearspan.bridge import boot as boot
    from clearspan.bridge import unhook as unhook
    from clearspan.cache import ActivationCache as ActivationCache
    from clearspan.effects import Effects as Effects
    from clearspan.errors import ClearspanError as ClearspanError
    from clearspan.inputs import Batch as Batch
    from clearspan.interventions import Intervention as Intervention
    from clearspan.interventions import register_function as register_function
    from clearspan.points import HookPoint as HookPoint
    from clearspan.points import get_act_name as get_act_name
    from clearspan.sweep import Pair as Pair
    from clearspan.sweep import Sweep as Sweep
    from clearspan.sweep import grid as grid
    from clearspan.view import open_report as open_report
    from clearspan.weights import FactoredMatrix as FactoredMatrix

__version__ = "0.1.0"

_HOMES = {
    "ActivationCache": "clearspan.cache",
    "Batch": "clearspan.inputs",
    "ClearspanError": "clearspan.errors",
    "Effects": "clearspan.effects",
    "FactoredMatrix": "clearspan.weights",
    "HookPoint": "clearspan.points",
    "Intervention": "clearspan.interventions",
    "Pair": "clearspan.sweep",
    "Sweep": "clearspan.sweep",
    "TransformerBridge": "clearspan.bridge",
    "boot": "clearspan.bridge",
    "get_act_name": "clearspan.points",
    "grid": "clearspan.sweep",
    "open_report": "clearspan.view",
    "register": "clearspan.architectures",
    "register_function": "clearspan.interventions",
    "unhook": "clearspan.bridge",
}
_MODULES = (
    "analysis",
    "architectures",
    "circuits",
    "components",
    "conversions",
    "errors",
    "interventions",
    "patching",
    "sweep",
    "transfers",
    "weights",
    "zoo",
)

__all__ = [*_HOMES, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"clearspan.{name}")
    if name not in _HOMES:
        if not name.startswith("_"):
            import_module("clearspan.transformer_lens").missing_from_library(name)
        raise AttributeError(f"module 'clearspan' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
