"""What a run asks of a device, counted: exact where times are not, and on a CPU too.

On a CPU, operators that compute stand for the kernels that a GPU would start, and reads by the host for the times that
it would wait. On CUDA, torch's profiler counts both as they are, in a run of its own.
"""

import contextlib
import cProfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from timing import Clock

ATTENTION = "scaled_dot_product"
NOTHING = ("_unsafe_view", "detach", "empty", "new_empty", "promote_types", "resize")
"""What operators' names begin with that compute nothing, besides those of views."""
READS = frozenset({"_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero"})
"""Operators whose result the host waits for: a number, or a tensor whose size depends on numbers."""
COPIES = frozenset({"cpu", "numpy", "tolist"})
"""Methods that bring a tensor to the host. Where it is there already they call no operator."""


@dataclass(frozen=True)
class Kernels:
    """What one run asked of its device.

    Attributes:
        operators: Operators that compute, those of the backward too: all but views and allocations.
        reads: How often the host asked for values. Where they are on an accelerator it waits for them; those of tensors
            that are on the CPU anyway, such as a batch's mask, are counted too.
        shapes: Distinct shapes of queries, keys and values that fused attention was called with.
        launches: Kernels that CUDA started; None on another device.
        synchronisations: How often the host waited for CUDA; None on another device.
    """

    operators: int
    reads: int
    shapes: int
    launches: int | None = None
    synchronisations: int | None = None

    @property
    def starts(self) -> int:
        """Kernels launched, or the operators that stand for them."""
        return self.operators if self.launches is None else self.launches

    @property
    def waits(self) -> int:
        """Synchronisations, or the reads that stand for them."""
        return self.reads if self.synchronisations is None else self.synchronisations

    @property
    def kinds(self) -> tuple[str, str]:
        """What `starts` and `waits` are."""
        return ("operators", "reads") if self.launches is None else ("launches", "synchronisations")

    def per(self, batches: int) -> str:
        """Returns the counts of one batch, as text."""
        starts, waits = self.kinds
        return f"{self.starts / batches:.0f} {starts} and {self.waits / batches:.1f} {waits} a batch"


def kernels_of(run: Callable[[], object], device: torch.device) -> Kernels:
    """Returns what a run asks of a device. It runs once before, so that what is made once is not counted."""
    run()
    counted, copied = _Operators(), _Copies()
    with counted, copied:
        run()
    found = Kernels(counted.count, counted.reads + copied.count, len(counted.shapes))
    if device.type != "cuda":
        return found
    events = _events_on_cuda(run)
    launches = sum(count for name, count in events.items() if "LaunchKernel" in name)
    waits = sum(count for name, count in events.items() if "Synchronize" in name)
    return Kernels(found.operators, found.reads, found.shapes, launches, waits - 1)


def python_calls(run: Callable[[], object]) -> int:
    """Returns how many functions Python calls in a run, built-in ones too."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    return sum(entry.callcount for entry in profiler.getstats())


@dataclass(frozen=True)
class Called:
    """How often a run calls a model, and what it does besides.

    Attributes:
        forwards: Calls of the model, also those that run some of its blocks.
        outside: Seconds outside of them.
    """

    forwards: int
    outside: float


def calls_of(run: Callable[[], object], model: torch.nn.Module, clock: Clock) -> Called:
    """Returns how often a run calls a model, and the time that it takes besides. It runs once before."""
    run()
    inside: list[float] = []
    with contextlib.ExitStack() as stack:
        handles = (
            model.register_forward_pre_hook(lambda *_: inside.append(-clock())),
            model.register_forward_hook(lambda *_: inside.append(clock()), always_call=True),
        )
        for handle in handles:
            stack.callback(handle.remove)
        start = clock()
        run()
        whole = clock() - start
    return Called(len(inside) // 2, whole - sum(inside))


def _events_on_cuda(run: Callable[[], object]) -> Mapping[str, int]:
    """Returns how often the profiler saw each event, one synchronisation at the end among them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    results = profiled.profiler.kineto_results if profiled.profiler else None
    assert results is not None, "the profiler ran"
    # As they are recorded: `profiled.events()` takes half a minute for what is recorded in four seconds.
    return Counter(event.name() for event in results.events())


class _Operators(TorchDispatchMode):
    """Counts operators that compute, those that the host waits for, and the shapes that attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or (name.startswith("index") and _has_mask(args)):
            self.reads += 1
        elif not func.is_view and not name.startswith(NOTHING):
            self.count += 1
        if ATTENTION in name:
            self.shapes.add(tuple(each.shape for each in args[:3]))
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Counts calls that bring a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # By name alone: the device of another tensor may be the CPU here, and an accelerator where the model is there.
        self.count += name in COPIES or (name == "to" and _says_cpu(*args[1:], *kwargs.values()))
        return func(*args, **kwargs)


def _has_mask(args: Sequence[object]) -> bool:
    """Returns whether values are chosen by a mask, whose true entries the host has to count."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _says_cpu(*values: object) -> bool:
    """Returns whether the CPU is among arguments, by name."""
    return any(isinstance(value, str) and value == "cpu" for value in values)
