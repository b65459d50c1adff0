"""interp-engine as a subject of the benchmark: its eager backend, which runs on a CPU too."""

from functools import partial
from typing import ClassVar

import interp_engine  # pyright: ignore[reportMissingImports]
import torch
from interp_engine.points import POINTS, Scope  # pyright: ignore[reportMissingImports]
from torch import Tensor

from hand_written import logit_difference
from libraries import Inputs, Tasks, layers_of, nbytes_of, patched_rows, rows_of
from reference import LAYERS


class InterpEngine:
    """interp-engine with fused attention, which serves all its points but scores and probabilities.

    It has no patching of its own: that is written with its `HookManager`, at the module that it names for a point.
    """

    name: ClassVar[str] = "interp-engine"

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self.model = interp_engine.load_model(
            folder, backend="eager", device=device, dtype="float32", attn_implementation="sdpa"
        )

    def tasks(self, given: Inputs) -> Tasks:
        """Returns the tasks. A forward with nothing listening is that of a capture of no points."""
        residuals = [("resid_post", layer) for layer in range(LAYERS)]
        layers = {Scope.GLOBAL: [None], Scope.LAYER: range(LAYERS)}
        places = [(point.name, layer) for point in POINTS for layer in layers[point.scope]]
        served = [place for place in places if self.model.serves(*place)]

        def kept() -> Tensor:
            cache = interp_engine.capture(self.model, given.tokens, residuals)
            return torch.stack([cache[place] for place in residuals])

        return {
            "forward": lambda: interp_engine.capture(self.model, given.tokens, []).output.logits,
            "residuals": kept,
            "everything": lambda: partial(nbytes_of, interp_engine.capture(self.model, given.tokens, served).tensors),
            "cells": lambda: torch.cat([self._patched(given, *cell) for cell in given.cells]),
            "batched cells": lambda: self._batched(given),
            "generation": lambda: self._generated(given),
        }

    def _patched(self, given: Inputs, layer: int, position: int) -> Tensor:
        def write(stream: Tensor) -> Tensor:
            stream = stream.clone()
            stream[:, position] = given.clean[layer][:, position]
            return stream

        module, side = self.model.resolve_point("resid_pre", layer)
        with interp_engine.HookManager() as hooks:
            hooks.write(module, write, point=side)
            return logit_difference(self.model.hf_model(given.corrupted, use_cache=False).logits)

    def _batched(self, given: Inputs) -> Tensor:
        with interp_engine.HookManager() as hooks:
            for layer in layers_of(given):
                module, side = self.model.resolve_point("resid_pre", layer)
                hooks.write(module, lambda stream, layer=layer: patched_rows(stream, layer, given), point=side)
            return logit_difference(self.model.hf_model(rows_of(given), use_cache=False).logits)

    def _generated(self, given: Inputs) -> Tensor:
        steps = interp_engine.generate_stream(
            self.model, given.prompt, max_tokens=given.new_tokens, temperature=0.0, stop_at_eos=False
        )
        new = given.prompt.new_tensor([[step.token_id for step in steps]])
        return torch.cat([given.prompt, new], dim=1)
