"""Libraries as subjects of one benchmark: the same tasks, each done in the library's own way.

Here are those of clearspan's own environment. The others are in `peers/`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import GPTBigCodeForCausalLM

import clearspan
import hand_written
from clearspan.interventions import Patch
from clearspan.sweep import LogitDifference, Sweep, grid
from hand_written import CORRECT, INCORRECT, Cell, Streams, Tokens, logit_difference, pre_hook
from reference import LAYERS, Reference

Task = Literal["forward", "residuals", "everything", "cells", "batched cells", "sweep", "generation"]
"""What is timed.

- forward: a forward with nothing listening. Gives logits.
- residuals: a forward that keeps every block's output. Gives them as one tensor `[layer, row, pos, d_model]`.
- everything: a forward that keeps all that the library has a name for. Gives what says how many bytes.
- cells: activation patching of the residual stream at some cells, one forward for each. Gives the metric by cell.
- batched cells: the same cells as rows of one batch.
- sweep: all cells, planned by the library.
- generation: greedy, by Hugging Face's cache. Gives tokens.
"""


Outcome = Tensor | Callable[[], int]
"""What a task gives."""
Tasks = Mapping[Task, Callable[[], Outcome]]


@dataclass(frozen=True)
class Inputs:
    """What the tasks are done on.

    Attributes:
        tokens: Of forwards.
        prompt: Of the generation.
        new_tokens: How many are generated.
        corrupted: The run that is patched, of one row.
        clean: The residual stream of the other run, entering each layer; it is found before the clock starts.
        cells: Layers and positions.
    """

    tokens: Tokens
    prompt: Tokens
    new_tokens: int
    corrupted: Tokens
    clean: Streams
    cells: Sequence[Cell]


class Library(Protocol):
    """A library with a model that it loaded from a folder to a device."""

    name: ClassVar[str]

    def __init__(self, folder: str, device: str = ...) -> None: ...

    def tasks(self, given: Inputs) -> Tasks:
        """Returns the tasks that the library can do."""
        ...


class Transformers:
    """transformers alone."""

    name: ClassVar[str] = "transformers"

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self.model = loaded(folder, device)
        self.generator: Any = self.model  # whose `generate` has types that no model fits

    def tasks(self, given: Inputs) -> Tasks:
        """Returns forward and generation. Its own hidden states have the last one normalised, and are no residuals."""
        return {
            "forward": lambda: self.model(given.tokens, use_cache=False).logits,
            "generation": lambda: self.generator.generate(given.prompt, **greedy(given)),
        }


class ForwardHooks:
    """transformers with torch hooks written by hand."""

    name: ClassVar[str] = "forward hooks"

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self.reference = Reference.of(loaded(folder, device))

    def tasks(self, given: Inputs) -> Tasks:
        """Returns what hooks are for."""
        return {
            "residuals": lambda: torch.stack(hand_written.residuals(self.reference, given.tokens)),
            "everything": lambda: partial(nbytes_of, hand_written.everything(self.reference, given.tokens)),
            "cells": lambda: self._patched(given),
            "batched cells": lambda: self._batched(given),
        }

    def _patched(self, given: Inputs) -> Tensor:
        return hand_written.patched_residuals(self.reference, given.corrupted, given.clean, given.cells)

    def _batched(self, given: Inputs) -> Tensor:
        with contextlib.ExitStack() as stack:
            for layer in layers_of(given):
                patch = partial(patched_rows, layer=layer, given=given)
                stack.enter_context(pre_hook(self.reference.blocks[layer], patch))
            return logit_difference(self.reference.model(rows_of(given), use_cache=False).logits)


class Clearspan:
    """clearspan."""

    name: ClassVar[str] = "clearspan"

    def __init__(self, folder: str, device: str = "cpu") -> None:
        self.bridge = clearspan.boot(folder, device=device)

    def tasks(self, given: Inputs) -> Tasks:
        """Returns all tasks."""
        bridge, length = self.bridge, given.corrupted.shape[1]
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
        laid = grid("resid_pre", Patch(), layer=range(LAYERS), position=range(length))
        known = {f"blocks.{layer}.hook_resid_pre": value for layer, value in enumerate(given.clean)}

        def kept() -> Tensor:
            cache = bridge.run_with_cache(given.tokens, names)[1]
            return torch.stack([cache[name] for name in names])

        def everything() -> Callable[[], int]:
            cache = bridge.run_with_cache(given.tokens)[1]
            return lambda: cache.nbytes

        def sweep() -> Tensor:
            metric = LogitDifference(CORRECT, INCORRECT)
            found = Sweep(bridge, given.corrupted, laid, metric, sources={"clean": known}).run(progress=False).mean()
            return torch.stack([found[cell] for cell in given.cells])

        return {
            "forward": lambda: bridge(given.tokens),
            "residuals": kept,
            "everything": everything,
            "cells": lambda: torch.cat([self._patched(given, *cell) for cell in given.cells]),
            "batched cells": lambda: self._batched(given),
            "sweep": sweep,
            "generation": lambda: bridge.generate(given.prompt, **greedy(given)),
        }

    def _patched(self, given: Inputs, layer: int, position: int) -> Tensor:
        def write(stream: Tensor, hook: object) -> Tensor:  # noqa: ARG001
            stream[:, position] = given.clean[layer][:, position]
            return stream

        hooks = [(f"blocks.{layer}.hook_resid_pre", write)]
        return logit_difference(self.bridge.run_with_hooks(given.corrupted, fwd_hooks=hooks))

    def _batched(self, given: Inputs) -> Tensor:
        hooks = [
            (f"blocks.{layer}.hook_resid_pre", lambda stream, hook, layer=layer: patched_rows(stream, layer, given))
            for layer in layers_of(given)
        ]
        return logit_difference(self.bridge.run_with_hooks(rows_of(given), fwd_hooks=hooks))


def loaded(folder: str, device: str) -> GPTBigCodeForCausalLM:
    """Returns the model of a folder, on a device."""
    model = GPTBigCodeForCausalLM.from_pretrained(folder)
    nn.Module.to(model, device)
    return model


def nbytes_of(value: object) -> int:
    """Returns the bytes that tensors in nested containers keep, each storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_in(value)}
    return sum(storages.values())


def tensors_in(value: object) -> Iterator[Tensor]:
    """Gives the tensors in nested containers."""
    match value:
        case Tensor():
            yield value
        case Mapping():
            yield from tensors_in(list(value.values()))
        case list() | tuple():
            for part in value:
                yield from tensors_in(part)
        case _:
            return


def greedy(given: Inputs) -> dict[str, Any]:
    """Returns transformers' options of a greedy generation of a fixed length."""
    count = given.new_tokens
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}


def layers_of(given: Inputs) -> list[int]:
    """Returns the layers that cells are in."""
    return sorted({layer for layer, _ in given.cells})


def rows_of(given: Inputs) -> Tokens:
    """Returns the run that is patched, in a row for each cell."""
    return given.corrupted.expand(len(given.cells), -1)


def patched_rows(stream: Tensor, layer: int, given: Inputs) -> Tensor:
    """Returns the residual stream entering a layer with the rows patched whose cell is there."""
    stream = stream.clone()
    for row, (at, position) in enumerate(given.cells):
        if at == layer:
            stream[row, position] = given.clean[layer][0, position]
    return stream
