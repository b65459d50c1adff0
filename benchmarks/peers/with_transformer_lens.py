"""TransformerLens as a subject of the benchmark: its bridge, and its patching."""

from functools import partial
from typing import ClassVar

import pandas
import torch
from torch import Tensor
from transformer_lens import patching  # pyright: ignore[reportMissingImports]
from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

from hand_written import logit_difference
from libraries import Inputs, Tasks, layers_of, nbytes_of, patched_rows, rows_of
from reference import LAYERS


class TransformerLens:
    """TransformerLens, with no processing of weights and no compatibility mode."""

    name: ClassVar[str] = "transformer-lens"

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self.bridge = TransformerBridge.boot_transformers(folder, device=device)

    def tasks(self, given: Inputs) -> Tasks:
        """Returns the tasks."""
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]

        def kept() -> Tensor:
            cache = self.bridge.run_with_cache(given.tokens, names_filter=names)[1]
            return torch.stack([cache[name] for name in names])

        return {
            "forward": lambda: self.bridge(given.tokens),
            "residuals": kept,
            "everything": lambda: partial(nbytes_of, self.bridge.run_with_cache(given.tokens)[1].cache_dict),
            "cells": lambda: self._patched(given),
            "batched cells": lambda: self._batched(given),
            "generation": lambda: self.bridge.generate(
                given.prompt, max_new_tokens=given.new_tokens, do_sample=False, stop_at_eos=False, verbose=False
            ),
        }

    def _patched(self, given: Inputs) -> Tensor:
        clean = {f"blocks.{layer}.hook_resid_pre": value for layer, value in enumerate(given.clean)}
        return patching.generic_activation_patch(
            self.bridge,
            given.corrupted,
            clean,
            lambda logits: logit_difference(logits)[0],
            patching.layer_pos_patch_setter,
            "resid_pre",
            index_df=pandas.DataFrame(given.cells, columns=["layer", "pos"]),
        )

    def _batched(self, given: Inputs) -> Tensor:
        def write(stream: Tensor, hook: object, layer: int) -> Tensor:  # noqa: ARG001
            return patched_rows(stream, layer, given)

        hooks = [(f"blocks.{layer}.hook_resid_pre", partial(write, layer=layer)) for layer in layers_of(given)]
        return logit_difference(self.bridge.run_with_hooks(rows_of(given), fwd_hooks=hooks))
