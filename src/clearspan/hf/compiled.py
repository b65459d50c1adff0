"""Compiled models and modules, in which torch hooks may never run."""

from collections.abc import Iterable

from torch import nn

from clearspan.errors import CompiledModelError


def around(model: nn.Module, paths: Iterable[str]) -> tuple[nn.Module, ...]:
    """Returns the modules at these paths and all modules that they are in, each once, the model first."""
    seen = {""}
    for path in paths:
        parts = path.split(".")
        seen.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return tuple(model.get_submodule(path) for path in sorted(seen))


def refuse_compiled(modules: Iterable[nn.Module]) -> None:
    """Raises if one of the modules is compiled.

    Raises:
        CompiledModelError: It names the module.
    """
    for module in modules:
        forward = vars(module).get("forward")
        if module._compiled_call_impl is not None or (
            forward is not None and "_torchdynamo_orig_callable" in vars(forward)
        ):
            raise CompiledModelError(
                f"{type(module).__name__} is compiled, and compiled code drops torch hooks quietly",
                fix="listen on a model that is not compiled: load it again without .compile()",
            )
