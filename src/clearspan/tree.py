"""The tree of a model's modules: looked up by path when they are used, since users replace and wrap them."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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


_Found = tuple[weakref.ref[nn.Module] | None, Sequence[dict[str, nn.Module | None]], Sequence[weakref.ref[nn.Module]]]
"""A model, the modules of each module that something was found in, and what was found."""


class Ways:
    """The ways to the modules at some paths, and to all that contain them: outer ones first.

    Finding them again where they still are takes a tenth of the time, and every run does it.

    Args:
        paths: The paths.

    Attributes:
        branches: The ways, each once.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        seen: set[str] = set()
        for path in paths:
            parts = path.split(".") if path else []
            seen.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        ends = ((path, *path.rpartition(".")) for path in sorted(seen))
        self.branches = tuple(Branch(path, parent, name) for path, parent, _, name in ends)
        self._paths = [path for path, _, _ in self.branches]
        self._names = [name for _, _, name in self.branches]
        self._found: _Found = (None, [], [])

    def modules(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Returns the modules that are there now by their paths, the model itself first.

        Raises:
            ModelChangedError: One is not there any more.
        """
        known, around, found = self._found
        there: list[Any] = list(map(dict.get, around, self._names))
        is_same = known is not None and known() is model
        # By a comprehension: under `torch.compile`, `map(call, found)` would call the modules.
        if not is_same or any(one is not reference() for one, reference in zip(there, found, strict=True)):
            there = self._walked(model)
        return dict(zip(["", *self._paths], [model, *there], strict=True))

    def _walked(self, model: nn.Module) -> list[nn.Module]:
        """Returns the modules on the ways, each looked up in the one around it."""
        modules = {"": model}
        for path, parent, name in self.branches:
            found = modules[parent]._modules.get(name)
            modules[path] = _handed_on(modules[parent], name, path) if found is None else found
        around = [modules[parent]._modules for _, parent, _ in self.branches]
        there = [modules[path] for path in self._paths]
        self._found = weakref.ref(model), around, list(map(weakref.ref, there))
        return there


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
