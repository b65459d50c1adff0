"""Double precision throughout: what models ask to be computed in single precision is computed in double as well."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """While it is on, `torch.float32` as an argument of torch's functions stands for `torch.float64`.

    The code of many models casts to `torch.float32` where half precision is too coarse: norms, rotations, recurrences.
    A copy of the model in double precision rounds there as the model itself does, unless these casts go to double too.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        return func(*map(_in_double, args), **{name: _in_double(one) for name, one in (kwargs or {}).items()})


def _in_double(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
