"""Quantised parameters: their values, as the library that quantised them gives them back."""

import torch
from torch import Tensor, nn

ROWS = 256
"""Rows that are dequantised at a time, where rows can be: what it takes beside the result."""


def dequantised(module: nn.Module, name: str) -> Tensor | None:
    """Returns a copy of a quantised parameter's values, in the dtype that its library computes in.

    Known are bitsandbytes (4 and 8 bit), and tensors that dequantise themselves, as those of torchao and quanto do.

    Returns:
        The values in the module's own layout, or None for a parameter that is not quantised.
    """
    parameter = module._parameters[name]
    assert parameter is not None, f"{type(module).__name__} has {name}"
    match type(parameter).__name__:
        case "Params4bit" | "Int8Params":
            if vars(vars(parameter).get("quant_state") or nn.Module()).get("packing_format_for_cpu"):
                return None  # repacked for one CPU's instructions, from which the library gives no values
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            return dequantize_bnb_weight(parameter, vars(module).get("state")).detach()
        case "Tensor" | "Parameter":
            return None
    # Every tensor has `dequantize`; a quantised one has its own.
    if getattr(type(parameter), "dequantize", None) is Tensor.dequantize:
        return None
    return _by_rows(parameter.detach())


def _by_rows(tensor: Tensor) -> Tensor:
    try:
        parts = [tensor[start : start + ROWS].dequantize() for start in range(0, len(tensor), ROWS)]
    except NotImplementedError:  # a layout that lets no rows be taken out
        return tensor.dequantize()
    return parts[0] if len(parts) == 1 else torch.cat(parts)
