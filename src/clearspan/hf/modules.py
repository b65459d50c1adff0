"""Modules that are compiled, offloaded or quantised, and a second model on the tensors of the first."""

import copy
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clearspan.errors import CompiledModelError, UnreadableWeightError
from clearspan.hf.adapters import acting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256
"""How many rows are dequantised at a time, which bounds the memory in use."""


def arguments_at(module: nn.Module, names: Container[str]) -> dict[str, int]:
    """Returns the named arguments of a module's forward, each with its position."""
    return {name: place for place, name in enumerate(_taken_by(type(acting(module)).forward)) if name in names}


@functools.lru_cache(1024)
def _taken_by(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of what a class's forward takes, which takes long to find out."""
    return tuple(inspect.signature(forward).parameters)[1:]


def refuse_compiled(modules: Iterable[nn.Module]) -> None:
    """Raises if one of the modules is compiled; has code that is compiled around them look at their hooks.

    Raises:
        CompiledModelError: It names the module.
    """
    _have_hooks_guarded()
    for module in modules:
        own = vars(module)
        if module._compiled_call_impl is not None or (
            "forward" in own and "_torchdynamo_orig_callable" in vars(own["forward"])
        ):
            raise CompiledModelError(
                f"{type(module).__name__} is compiled, and compiled code drops torch hooks quietly",
                fix="listen on a model that is not compiled: load it again without .compile()",
            )


def _have_hooks_guarded() -> None:
    """Has compiled functions that call modules be compiled anew where hooks have come to these.

    As torch is set, a function that was compiled when no hook was there never asks again. What was compiled under that
    setting is dropped, once in a process.
    """
    # Importing the compiler takes a second, and without it nothing is compiled.
    settings: Any = sys.modules.get("torch._dynamo.config")
    if settings is not None and settings.skip_nnmodule_hook_guards:
        settings.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module runs: where its weight is, or where accelerate brings it."""
    for parameter in module._parameters.values():  # nearly always it has one, and every run asks
        if parameter is not None:
            break
    else:
        parameter = next(module.parameters())
    return parameter.device if not parameter.is_meta else next(_brought_to(module), parameter.device)


_FACTORS = ("scaling", "inv_norm_factor", "softmax_scale")
"""What attention modules call the number by which they multiply queries times keys. GPT-J divides by `scale_attn`."""


def score_divisor(attention: nn.Module) -> float | None:
    """Returns what an attention module divides queries times keys by, or None where it has no such attribute."""
    own = vars(attention)
    factor = next((own[name] for name in _FACTORS if isinstance(own.get(name), float)), None)
    divisor = own.get("scale_attn") if factor is None else 1 / factor
    return divisor if divisor is None else float(divisor)


def _brought_to(module: nn.Module) -> Iterator[torch.device]:
    """Yields the devices to which accelerate's hooks, on a module and its parts, bring weights."""
    for part in module.modules():
        hook = vars(part).get("_hf_hook")
        # A hook may be several in a row, and some only move inputs.
        for one in () if hook is None else vars(hook).get("hooks", (hook,)):
            where = vars(one).get("execution_device")
            if where is not None:
                yield torch.device(where)


def dequantised(module: nn.Module, name: str) -> Tensor | None:
    """Returns a copy of a quantised parameter's values, in the dtype that its library computes in.

    It knows bitsandbytes (4 and 8 bit) and tensors that dequantise themselves, such as those of torchao and quanto.

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
    packed = parameter.detach()
    try:
        parts = [packed[start : start + ROWS].dequantize() for start in range(0, len(packed), ROWS)]
    except NotImplementedError:  # this layout cannot be sliced
        return packed.dequantize()
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sharing_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """Returns a model with modules and a config of its own that uses the first model's parameters and buffers.

    The user's torch hooks are copied with the modules; this library's are not.

    Raises:
        UnreadableWeightError: Modules are offloaded, so their parameters cannot be shared.
    """
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if any(tensor.is_meta for tensor in tensors):
        raise UnreadableWeightError(
            "an offloaded model cannot be processed",
            reason="its weights are in memory only while a module runs",
            fix="load it without offloading",
        )
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def untie(model: "PreTrainedModel") -> None:
    """Tells a model that its embeddings are no longer tied, so that saving and loading do not tie them again.

    What else it ties (a bias, in BERT's kind of head) becomes two parameters with the same values.
    """
    for name, other in vars(model)["all_tied_weights_keys"].items():
        around, _, leaf = name.rpartition(".")
        module, shared = model.get_submodule(around), model.get_parameter(name)
        if shared is model.get_parameter(other):
            module._parameters[leaf] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    model.config.tie_word_embeddings = False
    vars(model)["all_tied_weights_keys"] = {}
