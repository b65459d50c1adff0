"""What running blocks costs on a device: measured once a model, by a few short runs of one of its blocks."""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from clearspan._forward.forward import run_segment
from clearspan._forward.given import ModelInput
from clearspan.checks import check_counts, number_of
from clearspan.errors import InvalidArgumentError
from clearspan.inputs import Batch
from clearspan.model import Model, check_bridge
from clearspan.modes import no_grad, same_draws

BUDGET = 0.05
"""Seconds that one run of a block may take while it is measured."""
FEW = 16
"""Tokens of the runs that show what a block costs besides its tokens."""
MANY, MANY_ELSEWHERE = {"cpu": 512}, 8192
"""Tokens of the runs that show what a token costs, by kind of device, if they are not too slow."""
MOST, MOST_ELSEWHERE = {"cpu": 1024}, 32768
"""Tokens in a batch beyond which larger ones are no faster, by kind of device."""


@dataclass(frozen=True)
class Costs:
    """What running blocks costs on a device, in seconds.

    Attributes:
        token: A token in a block, in a large batch.
        floor: A block besides its tokens: reading its weights, starting its kernels.
        start: A forward besides its blocks: masks, positions, Python.
        join: That cells join in front of a layer: a batch of another shape, for which kernels are chosen.
        most: Tokens in a batch beyond which larger ones are no faster.

    Example:
        >>> import clearspan
        >>> costs = Costs.of(clearspan.boot("tiny-bigcode"))  # measured once a model and device
        >>> costs.token > 0, costs.most
        (True, 1024)
    """

    token: float
    floor: float
    start: float
    join: float
    most: int

    def __post_init__(self) -> None:
        for name in ("token", "floor", "start", "join"):
            seconds = number_of(name, getattr(self, name))
            if not seconds >= 0:
                raise InvalidArgumentError(f"{name}={seconds}", expected="seconds, 0 or more")
            object.__setattr__(self, name, seconds)
        check_counts(most=self.most)

    @classmethod
    def of(cls, model: Model) -> Self:
        """Returns the costs of a model on its device, measured when they are first asked for."""
        check_bridge(model)
        known = _KNOWN.setdefault(model.hf_model, {})
        key = model.device, model.hf_model.dtype
        if key not in known:
            known[key] = _measured(model)
        return cls(**vars(known[key]))

    def apart(self) -> Self:
        """Returns the costs where each join takes a forward of its own."""
        return replace(self, join=self.join + self.start)


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[object, Costs]]" = weakref.WeakKeyDictionary()
"""The costs measured, by model, device and dtype."""


@no_grad
def _measured(model: Model) -> Costs:
    """Measures one block in the middle, or the whole model: few tokens, several times over, and many, of two shapes."""
    kind, n_layers = model.device.type, len(model.blocks)
    is_whole = model.adapter.whole_forwards is not None
    blocks = n_layers if is_whole else 1
    length = min(FEW, model.cfg.n_ctx)

    def seconds(rows: int, more: int = 0) -> float:
        run = _forward(model, rows, length) if is_whole else _blocks(model, rows, length, 1 + more)
        _finish(model.device)
        start = time.perf_counter()
        run()
        _finish(model.device)
        return time.perf_counter() - start

    with model.taps.turns.unseen(), same_draws(model.device):
        seconds(1)
        few = min(seconds(1) for _ in range(2))
        floor = few if is_whole or n_layers == 1 else min(seconds(1, more=1) for _ in range(2)) - few
        rows = max(2, min(MANY.get(kind, MANY_ELSEWHERE) // length, int(BUDGET / few)))
        first, again = (min(map(seconds, (rows, rows + 1))) for _ in range(2))
    # Noise can make a difference negative: a tenth is what it is at the least.
    floor = max(floor, few / 10) / blocks
    token = max(again - few, few / 10) / ((rows - 1) * length * blocks)
    return Costs(
        token=token,
        floor=max(floor - length * token, 0.0),
        start=max(few - floor * blocks, 0.0),
        join=max(first - again, 0.0) / blocks,
        most=MOST.get(kind, MOST_ELSEWHERE),
    )


def _forward(model: Model, rows: int, length: int) -> Callable[[], object]:
    """Returns what runs the whole model."""
    tokens = torch.zeros(rows, length, dtype=torch.long, device=model.device)
    return lambda: model.hf_model(input_ids=tokens, use_cache=False)


def _blocks(model: Model, rows: int, length: int, count: int) -> Callable[[], object]:
    """Returns what runs some blocks in the middle."""
    start, stream = model.firsts[len(model.blocks) // 2], model.blocks[0]
    dtype = stream.stream_dtype or model.hf_model.dtype
    residual = torch.randn(rows, length, *stream.stream_shape, device=model.device, dtype=torch.float32).to(dtype)
    tokens = torch.zeros(rows, length, dtype=torch.long, device=model.device)
    kwargs = {"inputs_embeds": residual, "input_ids": tokens, "use_cache": False}
    given, stop = ModelInput(Batch(None, embeds=residual), kwargs), min(start + count, len(model.blocks))
    return lambda: run_segment(model, given, start, stop)


def _finish(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    torch.get_device_module(device).synchronize()
