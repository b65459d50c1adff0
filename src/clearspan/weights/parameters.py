"""Parameters of a model that shares them with another one: a shared parameter is replaced, never written."""

from collections.abc import Iterable

from torch import Tensor, nn


class OwnParameters:
    """Replaces parameters of a model, and tells those that it still shares from its own.

    Args:
        shared: The parameters that another model has too.
    """

    def __init__(self, shared: Iterable[nn.Parameter]) -> None:
        self._shared = {id(parameter) for parameter in shared}

    def replace(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Replaces a module's parameter, or adds one."""
        old = module._parameters.get(name)
        requires_grad = True if old is None else old.requires_grad
        module._parameters[name] = nn.Parameter(value.detach(), requires_grad=requires_grad)

    def own(self, module: nn.Module, name: str) -> Tensor:
        """Returns a parameter that may be written: a shared one is replaced by a copy first."""
        if id(module.get_parameter(name)) in self._shared:
            self.replace(module, name, module.get_parameter(name).detach().clone())
        return module.get_parameter(name).detach()
