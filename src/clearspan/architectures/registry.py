"""Which adapter serves which architecture: those of this package, those registered, those of installed packages."""

import importlib.metadata
import warnings
from collections.abc import Iterator
from types import TracebackType

from clearspan.architectures.adapter import AdapterSource, ArchitectureAdapter, name_of
from clearspan.architectures.alibi import BloomArchitectureAdapter, MPTArchitectureAdapter
from clearspan.architectures.falcon import FalconArchitectureAdapter
from clearspan.architectures.gemma3n import Gemma3nArchitectureAdapter, Gemma3nMultimodalArchitectureAdapter
from clearspan.architectures.gpt import (
    GPT2ArchitectureAdapter,
    GPTJArchitectureAdapter,
    GPTNeoXArchitectureAdapter,
)
from clearspan.architectures.gpt_bigcode import GPTBigCodeArchitectureAdapter
from clearspan.architectures.llama import (
    Cohere2ArchitectureAdapter,
    Gemma2ArchitectureAdapter,
    Gemma3ArchitectureAdapter,
    GraniteArchitectureAdapter,
    LlamaArchitectureAdapter,
    MistralArchitectureAdapter,
    Olmo2ArchitectureAdapter,
    Phi3ArchitectureAdapter,
    Qwen2ArchitectureAdapter,
    Qwen3ArchitectureAdapter,
)
from clearspan.architectures.mixtures import (
    DeepseekV3ArchitectureAdapter,
    GptOssArchitectureAdapter,
    MixtralArchitectureAdapter,
    Qwen3MoeArchitectureAdapter,
)
from clearspan.architectures.opt import OPTArchitectureAdapter
from clearspan.architectures.zaya import ZayaArchitectureAdapter
from clearspan.errors import InvalidArgumentError, PlugInWarning, UnsupportedArchitectureError
from clearspan.points import nearest

ADAPTERS: dict[str, AdapterSource] = {
    "BloomForCausalLM": BloomArchitectureAdapter,
    "Cohere2ForCausalLM": Cohere2ArchitectureAdapter,
    "DeepseekV3ForCausalLM": DeepseekV3ArchitectureAdapter,
    "FalconForCausalLM": FalconArchitectureAdapter,
    "GPT2LMHeadModel": GPT2ArchitectureAdapter,
    "GPTBigCodeForCausalLM": GPTBigCodeArchitectureAdapter,
    "GPTJForCausalLM": GPTJArchitectureAdapter,
    "GPTNeoXForCausalLM": GPTNeoXArchitectureAdapter,
    "Gemma2ForCausalLM": Gemma2ArchitectureAdapter,
    "Gemma3ForCausalLM": Gemma3ArchitectureAdapter,
    "Gemma3nForCausalLM": Gemma3nArchitectureAdapter,
    "Gemma3nForConditionalGeneration": Gemma3nMultimodalArchitectureAdapter,
    "GptOssForCausalLM": GptOssArchitectureAdapter,
    "GraniteForCausalLM": GraniteArchitectureAdapter,
    "LlamaForCausalLM": LlamaArchitectureAdapter,
    "MistralForCausalLM": MistralArchitectureAdapter,
    "MixtralForCausalLM": MixtralArchitectureAdapter,
    "MptForCausalLM": MPTArchitectureAdapter,
    "OPTForCausalLM": OPTArchitectureAdapter,
    "Olmo2ForCausalLM": Olmo2ArchitectureAdapter,
    "Phi3ForCausalLM": Phi3ArchitectureAdapter,
    "Qwen2ForCausalLM": Qwen2ArchitectureAdapter,
    "Qwen3ForCausalLM": Qwen3ArchitectureAdapter,
    "Qwen3MoeForCausalLM": Qwen3MoeArchitectureAdapter,
    "ZayaForCausalLM": ZayaArchitectureAdapter,
}
"""By class name of the Hugging Face model; several may share an adapter."""
GROUP = "clearspan.architectures"
"""Entry points of this group offer an adapter: their name is the class name of the model, their value the adapter."""


def find_adapter(architecture: str) -> AdapterSource | None:
    """Returns the adapter of a Hugging Face model class, by its name, or None where none is written.

    Raises:
        PlugInWarning: A warning: an installed package offers one that cannot be loaded.
    """
    return ADAPTERS.get(architecture) or _of_plug_ins(architecture)


def adapter_class(architecture: str) -> AdapterSource:
    """Returns the adapter of a Hugging Face model class, by its name.

    Raises:
        UnsupportedArchitectureError: None is written.
        PlugInWarning: A warning: an installed package offers one that cannot be loaded.
    """
    found = find_adapter(architecture)
    if found is None:
        names = sorted({*ADAPTERS, *(point.name for point in _plug_ins())})
        raise UnsupportedArchitectureError(
            f"no adapter for {architecture}",
            expected=", ".join(names),
            nearest=nearest(architecture, names),
            fix="write an adapter: CONTRIBUTING.md shows how, step by step",
        )
    return found


# --- registering -----------------------------------------------------------------------------------------------------


class Registration:
    """What `register` did. As a context manager it is undone at the end of the block; `undo` does it at once.

    Args:
        adapter: The adapter.
        before: The names that it serves, each with the adapter that served it before.
    """

    def __init__(self, adapter: AdapterSource, before: dict[str, AdapterSource | None]) -> None:
        self.adapter = adapter
        self._before = before

    def undo(self) -> None:
        """Gives the names back to what served them before; a name that was registered again since stays as it is."""
        for name, before in self._before.items():
            if ADAPTERS.get(name) is self.adapter:
                del ADAPTERS[name]
                if before is not None:
                    ADAPTERS[name] = before
        self._before = {}

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Registration({name_of(self.adapter)} for {', '.join(self._before) or 'nothing any more'})"


def register(adapter: AdapterSource, *models: str | type, replace: bool = False) -> Registration:
    """Has an adapter serve models of some classes, in this process.

    A package does so for all who install it by entry points of the group `clearspan.architectures`.

    Args:
        adapter: The adapter: a subclass of `ArchitectureAdapter`, or another `AdapterSource`.
        *models: The classes of the Hugging Face models, or their names.
        replace: Whether it may take the place of an adapter that serves a name already.

    Returns:
        The registration, which lasts unless it is undone: by its method, or as a context manager.

    Raises:
        InvalidArgumentError: It is no adapter, no class is named, or a name is served already.

    Example:
        >>> import clearspan
        >>> from clearspan.architectures.llama import LlamaArchitectureAdapter
        >>> with clearspan.register(LlamaArchitectureAdapter, "HeliumForCausalLM", "ArceeForCausalLM"):
        ...     clearspan.architectures.adapter_class("HeliumForCausalLM").__name__
        'LlamaArchitectureAdapter'
    """
    check_source(adapter)
    if not models:
        raise InvalidArgumentError(
            f"{name_of(adapter)} is registered for no model",
            expected="classes of Hugging Face models, or their names",
            fix=f"clearspan.register({name_of(adapter)}, type(model))",
        )
    names = [_class_name(model) for model in models]
    taken = [name for name in names if name in ADAPTERS and ADAPTERS[name] is not adapter]
    if taken and not replace:
        raise InvalidArgumentError(
            f"{', '.join(taken)} has an adapter already",
            got=", ".join(name_of(ADAPTERS[name]) for name in taken),
            fix="clearspan.register(..., replace=True); or clearspan.boot(model, adapter=...) for one model",
        )
    registration = Registration(adapter, {name: ADAPTERS.get(name) for name in names})
    ADAPTERS.update(dict.fromkeys(names, adapter))
    return registration


def _class_name(model: object) -> str:
    match model:
        case str():
            return model
        case type():
            return model.__name__
        case _:
            raise InvalidArgumentError(
                f"{model!r} is no class of a model",
                expected="classes of Hugging Face models, or their names",
                got=type(model).__name__,
            )


def check_source(adapter: object) -> AdapterSource:
    """Returns what makes adapters.

    Raises:
        InvalidArgumentError: It is something else.
    """
    is_class = isinstance(adapter, type)
    if is_class and issubclass(adapter, ArchitectureAdapter):
        return adapter
    if not is_class and isinstance(adapter, AdapterSource):
        return adapter
    raise InvalidArgumentError(
        f"{adapter!r} is no adapter",
        expected="a subclass of clearspan.architectures.ArchitectureAdapter, or another AdapterSource",
        got=f"the class {adapter.__name__}" if is_class else type(adapter).__name__,
        fix="the adapter's class itself, or its source" if isinstance(adapter, ArchitectureAdapter) else None,
    )


# --- installed packages ----------------------------------------------------------------------------------------------

_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What importing a package that is broken, or made for another release, raises."""


def _plug_ins() -> Iterator[importlib.metadata.EntryPoint]:
    return iter(importlib.metadata.entry_points(group=GROUP))


def _of_plug_ins(architecture: str) -> AdapterSource | None:
    """Returns the adapter that an installed package offers for a model class, and registers it; or None.

    Only the package that is asked for is imported. Of several that work, the first by name counts.
    """
    offers = [point for point in _plug_ins() if point.name == architecture]
    for offer in sorted(offers, key=_package):
        try:
            found = check_source(offer.load())
        except _FAULTS as error:
            said = str(error).splitlines()[0] if str(error) else "without a word"
            warnings.warn(
                f"the package {_package(offer)} offers an adapter for {architecture} that cannot be loaded\n"
                f"  where: {offer.value}\n  reason: {type(error).__name__}: {said}",
                PlugInWarning,
                stacklevel=2,
            )
        else:
            return ADAPTERS.setdefault(architecture, found)
    return None


def _package(point: importlib.metadata.EntryPoint) -> str:
    return "(unknown)" if point.dist is None else point.dist.name
