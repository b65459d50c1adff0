"""The tree of a model's modules: looked up by path when they are used, since users replace and wrap them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from clearspan.errors import ModelChangedError


class Branch(NamedTuple):
    """The way to a module.

    Attributes:
        path: Its path.
        parent: The path of the module that it is in.
        name: Its name there.
    """

    path: str
    parent: str
    name: str


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module that is at a path now.

    Raises:
        ModelChangedError: There is none any more.
    """
    module, names = model, path.split(".") if path else ()
    for name in names:
        found = module._modules.get(name)
        module = _handed_on(module, name, path) if found is None else found
    return module


def branches(paths: Iterable[str]) -> tuple[Branch, ...]:
    """Returns the ways to the modules at some paths and to all that contain them, each once, outer ones first."""
    seen: set[str] = set()
    for path in paths:
        parts = path.split(".") if path else []
        seen.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    ends = ((path, *path.rpartition(".")) for path in sorted(seen))
    return tuple(Branch(path, parent, name) for path, parent, _, name in ends)


def modules_at(model: nn.Module, ways: Sequence[Branch]) -> Mapping[str, nn.Module]:
    """Returns the modules that are there now by their paths, the model itself first.

    Raises:
        ModelChangedError: One is not there any more.
    """
    modules = {"": model}
    for path, parent, name in ways:
        found = modules[parent]._modules.get(name)
        modules[path] = _handed_on(modules[parent], name, path) if found is None else found
    return modules


def _handed_on(around: nn.Module, name: str, path: str) -> nn.Module:
    """Returns what a wrapper gives as its own part, such as that of the module in it."""
    try:
        found = getattr(around, name)
    except AttributeError:
        found = None
    if isinstance(found, nn.Module):
        return found
    raise ModelChangedError(
        f"{path} is not in the model any more",
        expected=f"a module {name!r} in {path.rpartition('.')[0] or 'the model'}, as there was when it was booted",
        got=f"{type(around).__name__} with {', '.join(child for child, _ in around.named_children()) or 'no modules'}",
        fix="clearspan.boot(model) again; a wrapper must hand on the parts of the module that it wraps",
    )
