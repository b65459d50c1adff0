"""Which entries of its config a model's own code reads, found in the source of its modules."""

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from clearspan.architectures import AdapterSource
from clearspan.architectures.adapter import FRAME_SIZES, SIZES
from clearspan.hf.loading import stored, text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Reads = tuple[tuple[str, bool], ...]
"""Names of entries, each with whether it is read for more than the shape of a module of torch."""


def entries_read(model: "PreTrainedModel") -> dict[str, bool]:
    """Returns the entries of the config that the code of a model's modules reads, under the names in the code.

    Each comes with whether it is read for more than to build modules of torch, whose shapes show it. What transformers
    reads outside of a model's own files (rotations, masks, activation functions) is not among them.
    """
    found: dict[str, bool] = {}
    for name, does_more in (read for home, classes in _homes(model).items() for read in _reads(home, classes)):
        found[name] = found.get(name, False) or does_more
    return found


def _homes(model: "PreTrainedModel") -> dict[str, frozenset[str]]:
    """Returns the Python modules that hold the classes of a model's modules, each with the names of these classes."""
    homes: dict[str, set[str]] = {}
    for kind in {type(module) for module in model.modules()}:
        for base in kind.__mro__:
            if issubclass(base, nn.Module) and not base.__module__.startswith(_NOT_A_MODELS):
                homes.setdefault(base.__module__, set()).add(base.__name__)
    return {home: frozenset(classes) for home, classes in homes.items()}


_NOT_A_MODELS = ("torch.", "transformers.modeling_", "transformers.activations", "transformers.generation", "peft.")
"""Python modules whose classes serve all models."""


@functools.cache
def _reads(home: str, classes: frozenset[str]) -> Reads:
    """Returns what classes of a Python module, and its functions, read of a config; nothing where it has no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[home]))
    except (KeyError, OSError, TypeError):
        return ()
    parts = [part for part in tree.body if not isinstance(part, ast.ClassDef) or part.name in classes]
    return tuple(read for part in parts for read in _in(part, does_more=True))


def _in(node: ast.AST, *, does_more: bool) -> Iterator[tuple[str, bool]]:
    name = _entry(node)
    if name is not None:
        yield name, does_more
    inner = does_more and not _builds(node)
    for child in ast.iter_child_nodes(node):
        yield from _in(child, does_more=inner)


def _entry(node: ast.AST) -> str | None:
    """Returns the entry that an expression reads: `config.x`, `self.config.x` or `getattr(config, "x")`."""
    match node:
        case ast.Attribute(value=config, attr=name, ctx=ast.Load()) if _is_config(config):
            return name
        case ast.Call(func=ast.Name("getattr"), args=[config, ast.Constant(str(name)), *_]) if _is_config(config):
            return name
        case _:
            return None


def _is_config(node: ast.AST) -> bool:
    match node:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name.endswith(("config", "cfg"))
        case _:
            return False


def _builds(node: ast.AST) -> bool:
    """Whether an expression makes a module of torch."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name("nn"), attr=kind)):
            return kind[:1].isupper()
        case _:
            return False


# --- names and defaults ----------------------------------------------------------------------------------------------


def stored_name(config: "PretrainedConfig", name: str) -> str:
    """Returns the name under which a config keeps an entry that has a common name too."""
    return config.attribute_map.get(name, name)


def defaults(config: "PretrainedConfig") -> dict[str, Any]:
    """Returns the entries of a config of the same class with nothing set; none where the class makes no such one."""
    try:
        return vars(type(config)())
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def entries_of_sizes(model: "PreTrainedModel", source: AdapterSource) -> set[str]:
    """Returns the entries from which the sizes of a model come, under the names that its config keeps them by."""
    config = text_config(model)
    chosen = {stored(config, names) for names in {**FRAME_SIZES, **SIZES, **source.sizes}.values()}
    return {stored_name(config, name) for name in chosen if name is not None}
