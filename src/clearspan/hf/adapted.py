"""Weights that a base layer and its adapters of peft make together, and models without adapters.

Plain LoRA is added up. Every other adapter of a linear map or an embedding is asked for its outputs, which say what its
weight is, whatever its algebra. A linear map's weight is compared with what the module does.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from clearspan.errors import UnreadableWeightError
from clearspan.hf.adapters import acting, active, active_adapters, kind_of, tuners
from clearspan.hf.modules import dequantised
from clearspan.hf.torch_hooks import without_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES = 4
"""Random inputs on which a weight is compared with its module."""
TOLERANCE = 64.0
"""Units in the last place by which outputs may differ, relative to the largest; measured at most 6 of float32."""
QUANTISED = 0.03
"""The same where the base is quantised, since 8 bit kernels round their input too; measured at most 1.2e-2."""


def adapted(module: nn.Module, name: str, where: str) -> Tensor | None:
    """Returns a weight as a base layer and its active adapters make it, on the graph of the parameters of both.

    Args:
        module: The module.
        name: The parameter's name in the base layer.
        where: The component's path, for an error's text.

    Returns:
        The weight, in the base layer's layout; or None where it is one parameter.

    Raises:
        UnreadableWeightError: What the adapter does is not one weight.
    """
    if kind_of(type(module)) is None:
        return None
    layer = _Layer(module, where)
    for tuner, _ in layer.tuners:
        if tuner.disable_adapters and tuner.merged:
            raise layer.unreadable(name, "a merged adapter is disabled, and the next forward takes it out again")
    if not any(active(tuner) for tuner, _ in layer.tuners):
        return None
    with torch.autocast(layer.device.type, enabled=False):
        return layer.read(name)


class _Layer:
    """A base layer with adapters that act.

    Args:
        module: The module.
        where: The component's path.
    """

    def __init__(self, module: nn.Module, where: str) -> None:
        self.module, self.where = module, where
        self.tuners = list(tuners(module))
        self.base: Any = acting(module)

    @property
    def device(self) -> torch.device:
        """Where the base layer's parameters are."""
        return next(self.base.parameters()).device

    def unreadable(self, name: str, reason: str) -> UnreadableWeightError:
        """Returns the error for a weight that cannot be told."""
        adapters = ", ".join(map(repr, active_adapters(self.module))) or "none"
        return UnreadableWeightError(
            f"the {name} of {self.where} cannot be told",
            where=f"{type(self.module).__name__} of {type(self.base).__name__}, active adapters: {adapters}",
            reason=reason,
            fix="points that need no weight; or peft_model.merge_and_unload(), and boot what it returns",
        )

    def read(self, name: str) -> Tensor | None:
        """Returns a weight, or None where no adapter changes it."""
        if any(part.training and part.p for part in self.module.modules() if isinstance(part, nn.Dropout)):
            raise self.unreadable(name, "the adapter drops values at random in training mode; bridge.eval() ends it")
        if all(kind == "parameters" for _, kind in self.tuners):
            return self._added(name, [tuner for tuner, _ in self.tuners if tuner.parameter_name == name])
        if any(kind == "parameters" for _, kind in self.tuners):
            raise self.unreadable(name, "adapters of different kinds lie upon one another")
        if name == "bias" and self._is_plain():
            return None
        match self.base:
            case nn.Embedding():
                return self._table()
            case nn.Linear():
                return self._linear(name, is_transposed=False)
            case nn.Module() if type(self.base).__name__ == "Conv1D":
                return self._linear(name, is_transposed=True)
        raise self.unreadable(name, f"what an adapter makes of a {type(self.base).__name__} is not known")

    def _value(self, name: str) -> Tensor:
        values = dequantised(self.base, name)
        return self.base._parameters[name] if values is None else values

    def _added(self, name: str, tuners: list[Any]) -> Tensor | None:
        """Returns a parameter plus what tuners add to it; None where none does."""
        added = [tuner.get_delta_weight(adapter) for tuner in tuners for adapter in active(tuner)]
        if not added:
            return None
        value = self._value(name)
        if not value.is_floating_point():
            raise self.unreadable(name, f"the base is quantised, and held as {value.dtype}")
        return sum(added, value).to(value.dtype)

    # --- linear maps -------------------------------------------------------------------------------------------------

    def _linear(self, name: str, *, is_transposed: bool) -> Tensor | None:
        """Returns the weight or the bias of a linear map, compared with what the module does."""
        run = _alone(self.module)
        width = self.base._parameters["weight"].shape[0] if is_transposed else self.base.in_features
        nothing = torch.zeros(1, width, device=self.device, dtype=self._dtype)
        has_bias = self.base._parameters.get("bias") is not None
        if not has_bias and run(nothing).any():
            raise self.unreadable(name, "the adapter adds a bias to a base layer that has none")
        if self._is_plain():
            stored = changed = self._added("weight", [tuner for tuner, _ in self.tuners])
            assert stored is not None, "an adapter is active"
            weight, bias = stored.T if is_transposed else stored, self._value("bias") if has_bias else None
        else:
            without_bias = _alone(self.module, neutral=self.base)
            found = without_bias(torch.eye(width, device=self.device, dtype=self._dtype)) - without_bias(nothing)
            weight, stored = found.T, found if is_transposed else found.T
            bias = changed = run(nothing)[0] if has_bias else None
        self._check(run, weight, bias, name)
        return stored if name == "weight" else changed

    def _is_plain(self) -> bool:
        """Whether it is LoRA with nothing else, whose part can be added to the weight."""
        return all(
            "LoraLayer" in {base.__name__ for base in type(tuner).__mro__}
            and not (tuner.lora_variant or any(tuner.lora_bias.values()))
            for tuner, _ in self.tuners
        )

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype that the base layer takes."""
        weight = self.base._parameters["weight"]
        compute = vars(self.base).get("compute_dtype")
        return weight.dtype if weight.is_floating_point() else compute or torch.get_default_dtype()

    @torch.no_grad()
    def _check(self, run: nn.Module, weight: Tensor, bias: Tensor | None, name: str) -> None:
        """Raises unless the module maps random inputs as the weight `[out, in]` and the bias do."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(PROBES, weight.shape[1], generator=generator).to(self.device, self._dtype)
        exact = torch.promote_types(self._dtype, torch.float32)
        found = run(inputs).to(exact)
        expected = linear(inputs.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
        tolerance = TOLERANCE * torch.finfo(self._dtype).eps
        if dequantised(self.base, "weight") is not None:
            tolerance = max(tolerance, QUANTISED)
        if not torch.allclose(found, expected, rtol=0, atol=tolerance * float(found.abs().max())):
            raise self.unreadable(name, "what the module does is not the product of its input with one weight")

    # --- embeddings --------------------------------------------------------------------------------------------------

    def _table(self) -> Tensor:
        """Returns an embedding's table: its outputs for all ids, before a scale of the embedding's own."""
        scales = "embed_scale" in {*vars(self.base), *self.base._buffers}
        if type(self.base).forward is not nn.Embedding.forward and not scales:
            raise self.unreadable("weight", f"a {type(self.base).__name__} does more than to look its input up")
        ids = torch.arange(len(self.base._parameters["weight"]), device=self.device)
        return _alone(self.module, neutral=self.base)(ids)


def _alone(module: nn.Module, *, neutral: nn.Module | None = None) -> nn.Module:
    """Returns a module on the same tensors, whose class's forward runs without hooks, as its parts' do.

    Args:
        module: The module.
        neutral: A part whose bias is to add nothing, and which is not to scale its output.
    """

    def change(part: nn.Module, own: nn.Module) -> None:
        state = vars(own)
        state.pop("forward", None)
        state["_compiled_call_impl"] = None
        if part is not neutral:
            return
        bias, scale = part._parameters.get("bias"), part._buffers.get("embed_scale")
        if bias is not None:
            zeros = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
            state["_parameters"] = {**part._parameters, "bias": zeros}
        if scale is not None:
            state["_buffers"] = {**part._buffers, "embed_scale": torch.ones_like(scale)}
        if "embed_scale" in state:
            state["embed_scale"] = 1.0

    return without_hooks(module, change)


# --- models ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(model: "PreTrainedModel") -> None:
    """Replaces all modules of peft in a model by plain ones with the weights that act.

    Args:
        model: A model whose modules are its own; tensors that it shares stay as they are.

    Raises:
        UnreadableWeightError: What an adapter does is not one weight.
    """
    _merge_in(model, "")
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)


def _merge_in(module: nn.Module, path: str) -> None:
    for name, part in module._modules.items():
        if part is None:
            continue
        where = f"{path}.{name}" if path else name
        if kind_of(type(part)) is not None:
            part = module._modules[name] = _plain(part, where)
        _merge_in(part, where)


def _plain(module: nn.Module, where: str) -> nn.Module:
    """Returns the module that acts in the place of one of peft, with the weights that it makes of it."""
    found = acting(module)
    own = {name: parameter for name, parameter in found._parameters.items() if parameter is not None}
    values = {name: adapted(module, name, where) for name in own}
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    for name, value in values.items():
        if value is not None:
            found._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=is_trained)
    return found
