"""Rehearsals: the model's own code computes a forward's shapes, on a copy of the model without numbers."""

import contextlib
import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from clearspan.errors import ClearspanError, UnplannableError
from clearspan.hf.observers import observed, uses_interface
from clearspan.hf.recording import Recording, RecordingPlan
from clearspan.hf.tensors import primary_input
from clearspan.hf.torch_hooks import HOOK_TABLES
from clearspan.points import Place

META, CPU = torch.device("meta"), torch.device("cpu")
ELSEWHERE = torch.device("meta", 1)
"""In a rehearsal, stands for a device other than the model's."""
SMALL = 2**20
"""A rehearsal computes tensors of integers up to this many numbers."""


def rehearse(
    model: nn.Module,
    places: Iterable[Place],
    recording: Recording,
    kwargs: Mapping[str, Any],
    experts: Iterable[nn.Module] = (),
) -> None:
    """Fills a recording with what a forward would make at some places, as tensors on the meta device.

    It reads, copies and loads no weight, calls no hook, and leaves torch's random numbers as they are.

    Args:
        model: The Hugging Face model.
        places: What to keep.
        recording: Where to keep it.
        kwargs: Keywords of the model's forward; it may read the values of ids and masks.
        experts: Modules whose forward depends on numbers, and whose output has the shape of their input.

    Raises:
        UnplannableError: The forward reads other numbers, or runs a kernel that cannot compute shapes alone.
    """
    try:
        _run(_without_numbers(model, experts), places, recording, kwargs)
    except ClearspanError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnplannableError(
            "the shapes of this model's forward are not known without running it",
            where=type(model).__name__,
            reason=str(error).partition("\n")[0],
        ) from error


def _run(copied: nn.Module, places: Iterable[Place], recording: Recording, kwargs: Mapping[str, Any]) -> None:
    plan = RecordingPlan.of(places)
    modules = plan.ways.modules(copied)
    kept = {modules[inside.path] for inside in plan.insides}
    # Attention that is not recorded is observed too, so that no kernel runs.
    others = [module for module in copied.modules() if "config" in vars(module) and uses_interface(module)]
    given = tree_map_only(Tensor, lambda tensor: tensor.to(META if tensor.is_floating_point() else CPU), dict(kwargs))
    with contextlib.ExitStack() as stack:
        for context in (torch.no_grad(), torch.random.fork_rng([]), ShapesAlone()):
            stack.enter_context(context)
        stack.enter_context(recording.hooks(plan, modules))
        stack.enter_context(observed({module: lambda call: call.run() for module in others if module not in kept}))
        copied(**given)


class ShapesAlone(TorchDispatchMode):
    """Computes small tensors that follow from ids, positions and masks; of everything else, only shapes.

    So a forward may ask something of its input (is there padding? are there several sequences in a row?).
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_meta = sum(tensor.is_meta for tensor in tensors)
        if on_meta:
            return _on_meta(func, args, kwargs, is_mixed=on_meta < len(tensors))
        if kwargs.get("device") == META:
            made = func(*args, **kwargs)
            is_computed = made.numel() <= SMALL and not made.is_floating_point()
            return func(*args, **{**kwargs, "device": CPU}) if is_computed else made
        if any(tensor.numel() > 1024 for tensor in tensors):
            made = _on_meta(func, args, kwargs)
            if any(isinstance(leaf, Tensor) and leaf.numel() > SMALL for leaf in tree_leaves(made)):
                return made
        return func(*args, **kwargs)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_mixed: bool = True) -> Any:
    if is_mixed:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
    device = kwargs.get("device")
    return func(*args, **(kwargs if device is None or device.type == "meta" else {**kwargs, "device": META}))


def _without_numbers(model: nn.Module, experts: Iterable[nn.Module]) -> nn.Module:
    """Returns a copy of a model without hooks, whose tensors have only shapes."""
    memo: dict[int, Any] = {
        id(tensor): _twin(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())
    }
    for module in model.modules():
        own = vars(module)
        memo |= {id(hooks): OrderedDict() for name, hooks in own.items() if name.endswith(HOOK_TABLES)}
        if "_hf_hook" in own:
            memo[id(own["_hf_hook"])] = object()  # it holds the weights that accelerate brings in
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize == 1:
            memo[id(module)] = _Packed(module)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name in ("_hf_hook", "_old_forward", "forward"):
            vars(module).pop(name, None)
        if "gradient_checkpointing" in vars(module):
            vars(module)["gradient_checkpointing"] = False
    for module in experts:
        vars(memo[id(module)])["forward"] = _of_its_inputs_shape
    return copied


def _twin(tensor: Tensor) -> Tensor:
    """Returns a tensor of the same kind and shape on the meta device, also of a quantised one."""
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin


def _of_its_inputs_shape(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(primary_input(args, kwargs))


class _Packed(nn.Module):
    """Stands for a linear map with packed weights: its output has the input's dtype and the map's width."""

    def __init__(self, packed: nn.Linear) -> None:
        super().__init__()
        self.weight = _twin(packed.weight)
        self.width = packed.out_features

    def forward(self, value: Tensor) -> Tensor:
        """Returns a tensor of the map's output's shape."""
        return value.new_empty(*value.shape[:-1], self.width)
