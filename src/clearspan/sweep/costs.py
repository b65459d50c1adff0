"""What running blocks costs on a device: measured once a model, by a few short runs of one of its blocks."""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from clearspan._forward.forward import run_segment
from clearspan._forward.given import ModelInput
from clearspan.inputs import Batch
from clearspan.model import Model
from clearspan.modes import no_grad

BUDGET = 0.05
"""Seconds that one run of a block may take while it is measured."""
FEW, MANY = 16, {"cpu": 512}
"""Tokens of the runs: as few as show what a block costs besides them, and as many as show what a token costs; these by
kind of device."""
MANY_ELSEWHERE = 8192
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
    """

    token: float
    floor: float
    start: float
    join: float
    most: int

    @classmethod
    def of(cls, model: Model) -> Self:
        """Returns the costs of a model on its device, measured when they are first asked for."""
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
    """Measures one block in the middle: few tokens, several times over, and many; the first run of a size apart."""
    kind, n_layers = model.device.type, len(model.blocks)
    most = MOST.get(kind, MOST_ELSEWHERE)
    if model.adapter.whole_forwards:
        return Costs(1e-6, FEW * 1e-6, FEW * 1e-6, 0.0, most)
    layer = model.firsts[n_layers // 2]
    length = min(FEW, model.cfg.n_ctx)

    def block(rows: int, stop: int = layer + 1) -> Callable[[], object]:
        residual = torch.randn(rows, length, *model.blocks[0].stream_shape, device=model.device)
        residual = residual.to(model.blocks[0].stream_dtype or model.hf_model.dtype)
        return lambda: _segment(model, residual, layer, stop)

    with model.taps.turns.unseen():
        block(1)()
        one = min(_seconds(block(1), model.device) for _ in range(2))
        two = min(_seconds(block(1, min(layer + 2, n_layers)), model.device) for _ in range(2))
        rows = max(1, min(MANY.get(kind, MANY_ELSEWHERE) // length, int(BUDGET / one)))
        many = block(rows)
        first, again = _seconds(many, model.device), _seconds(many, model.device)
    floor = max(two - one, 0.1 * one)
    token = max(again - one, 0.1 * one) / max(1, (rows - 1) * length)
    return Costs(token, max(floor - length * token, 0.0), max(one - floor, 0.0), max(first - again, 0.0), most)


def _segment(model: Model, residual: Tensor, start: int, stop: int) -> object:
    tokens = torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)
    given = ModelInput(
        Batch(None, embeds=residual), {"inputs_embeds": residual, "input_ids": tokens, "use_cache": False}
    )
    return run_segment(model, given, start, stop)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns how long something takes on a device."""
    there = torch.get_device_module(device)
    there.synchronize()
    start = time.perf_counter()
    run()
    there.synchronize()
    return time.perf_counter() - start
