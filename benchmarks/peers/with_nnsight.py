"""nnsight as a subject of the benchmark: traces of a `TransformersModel`."""

from collections.abc import Callable
from typing import ClassVar

import nnsight  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from hand_written import logit_difference
from libraries import Inputs, Tasks, greedy, nbytes_of
from reference import LAYERS


class NNsight:
    """nnsight. The code of a trace is written in place, since nnsight reads its source there."""

    name: ClassVar[str] = "nnsight"

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self.model = nnsight.TransformersModel(folder, task="text-generation", dispatch=True, device_map=device)

    def tasks(self, given: Inputs) -> Tasks:
        """Returns the tasks."""
        return {
            "forward": lambda: self._forward(given),
            "residuals": lambda: self._residuals(given),
            "everything": lambda: self._everything(given),
            "cells": lambda: torch.cat([self._patched(given, *cell) for cell in given.cells]),
            "batched cells": lambda: self._batched(given),
            "generation": lambda: self._generated(given),
        }

    def _forward(self, given: Inputs) -> Tensor:
        with self.model.trace(given.tokens, use_cache=False):
            logits = self.model.output.logits.save()
        return logits  # noqa: RET504 (a trace leaves its values in variables)

    def _residuals(self, given: Inputs) -> Tensor:
        blocks = list(self.model.transformer.h)
        with self.model.trace(given.tokens, use_cache=False) as tracer:
            cache = tracer.cache(modules=blocks)
        return torch.stack([cache[f"model.transformer.h.{layer}"].output for layer in range(LAYERS)])

    def _everything(self, given: Inputs) -> Callable[[], int]:
        with self.model.trace(given.tokens, use_cache=False) as tracer:
            cache = tracer.cache(include_inputs=True)
        return lambda: nbytes_of([(cache[name].inputs, cache[name].output) for name in cache.keys()])  # noqa: SIM118

    def _patched(self, given: Inputs, layer: int, position: int) -> Tensor:
        block, value = self.model.transformer.h[layer], given.clean[layer][:, position]
        with self.model.trace(given.corrupted, use_cache=False):
            stream = block.input.clone()
            stream[:, position] = value
            block.input = stream
            found = nnsight.save(logit_difference(self.model.output.logits))
        return found  # noqa: RET504

    def _batched(self, given: Inputs) -> Tensor:
        with self.model.trace(use_cache=False) as tracer:
            found = nnsight.save([None] * len(given.cells))
            for row, (layer, position) in enumerate(given.cells):
                with tracer.invoke(given.corrupted):
                    block = self.model.transformer.h[layer]
                    stream = block.input.clone()
                    stream[:, position] = given.clean[layer][:, position]
                    block.input = stream
                    found[row] = logit_difference(self.model.output.logits)
        return torch.cat(list(found))

    def _generated(self, given: Inputs) -> Tensor:
        with self.model.generate(given.prompt, **greedy(given)) as tracer:
            tokens = tracer.result.save()
        return tokens  # noqa: RET504
