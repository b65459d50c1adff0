"""What a call has torch do that a GPU would feel, counted on any device: operators, and waits for their results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READ = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
"""What hands a tensor's numbers to Python, and is seen only where it is called."""
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
"""Operators whose result Python waits for: a number, or a tensor whose size depends on numbers."""
_COMPUTES_NOTHING = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::promote_types")


@dataclass(frozen=True)
class Counts:
    """What a call had torch do.

    Attributes:
        operators: Operators that compute, those of the backward too; each is one kernel or a few.
        synchronisations: How often Python reads numbers of a tensor. Where that lies on a GPU, it waits there; those of
            tensors that are on the CPU anyway, such as a batch's mask, are counted as well.
    """

    operators: int
    synchronisations: int


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (func.is_view or name.startswith(_COMPUTES_NOTHING)):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in _READ
        return func(*args, **(kwargs or {}))


def launched(function: Callable[[], object]) -> Counts:
    """Returns what a call has torch do. It is called once before, so that what is made once is not counted."""
    function()
    with _Reads() as reads, _Operators() as operators:
        function()
    waits = sum(name in _WAITS for name in operators.names)
    return Counts(len(operators.names) - waits, reads.count + waits)
