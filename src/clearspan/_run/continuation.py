"""Runs that continue another: from its residual stream at a layer, with its keys and values of earlier positions."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clearspan._forward.forward import run_segment
from clearspan._forward.given import ModelInput, prepare
from clearspan._run import caching
from clearspan._run.hooks import Hooks, attached, check_fired
from clearspan._run.sources import SourceRun
from clearspan.components import MLPBridge
from clearspan.errors import InvalidArgumentError
from clearspan.hf.growing import Extent, Given, Shapes, UnfitForGrowth, growing, shapes_given
from clearspan.hf.kernels import unplanned
from clearspan.hf.keywords import KV_CACHE, kv_cache_keyword, without_kv_cache
from clearspan.hf.segments import Stopped, narrowed
from clearspan.hf.sequence import Prefix, empty
from clearspan.inputs import Batch
from clearspan.model import Model, check_bridge
from clearspan.modes import no_grad


@dataclass(frozen=True)
class Beside:
    """An input that is run in the forward of a base run, as further rows.

    Attributes:
        batch: The input. Its real tokens are in the columns of the base run's.
        names: The points whose values are kept.
    """

    batch: Batch
    names: Sequence[str]


@dataclass(frozen=True)
class BaseRun:
    """A run from which others go on.

    Attributes:
        model: The model.
        given: What it was given.
        residuals: The residual stream entering a layer, `[row, pos, d_model]`, by layer; the last one by `n_layers`.
        prefix: Its keys and values, where others continue after some of its positions.
        logits: What the model returned `[row, pos, d_vocab]`.
        known: What the model was seen to give its blocks, by the extent of the run; other runs may have filled it.
        beside: The runs of other inputs that were further rows of its forward, by name.
    """

    model: Model
    given: ModelInput
    residuals: Mapping[int, Tensor]
    prefix: Prefix | None
    logits: Tensor
    known: dict[Extent, Given] = field(default_factory=dict, repr=False, compare=False)
    beside: Mapping[str, SourceRun] = field(default_factory=dict)

    @functools.cached_property
    def rows(self) -> int:
        """Rows of its input."""
        return self.given.size[0]

    @property
    def length(self) -> int:
        """Positions of its input."""
        return self.given.size[1]

    def entering(self, layer: int, first: int, copies: int) -> Tensor:
        """Returns the residual stream entering a layer from a position on, `copies` times over: a copy."""
        return _copied(self.residuals[layer][:, first:], copies)

    def embedded(self, first: int, copies: int, hooks: Hooks) -> Tensor:
        """Returns what the embeddings make of the input from a position on, `copies` times over, with hooks on them."""
        ids = {name: self.given.kwargs.get(name) for name in ("input_ids", "inputs_embeds")}
        value = {name: _repeated(tensor[:, first:], copies) for name, tensor in ids.items() if tensor is not None}
        return self._run(value, None, 0, first, copies, hooks)

    def continued(
        self, residual: Tensor, start: int, stop: int, first: int, hooks: Hooks, keep: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the residual stream before layer `stop` of a run that starts at layer `start`.

        Args:
            residual: What enters layer `start`, `[copies * row, pos - first, d_model]`.
            start: The first layer run.
            stop: The layer before which it ends; `n_layers` for the last residual stream.
            first: The position of the whole sequence at which `residual` starts.
            hooks: Forward hooks of the run.
            keep: Positions of `residual` whose last residual stream is wanted, with `stop=n_layers`: the last MLP is
                run on these alone. None for all.
        """
        copies = len(residual) // self.rows
        kept = self._kept(keep, residual, stop)
        return self._run({"inputs_embeds": residual}, start, stop, first, copies, hooks, kept)

    def grown(
        self,
        joining: Mapping[int, Tensor],
        first: int,
        hooks: Hooks,
        keep: Sequence[int] | None = None,
        *,
        in_one: bool = True,
    ) -> Tensor:
        """Returns the last residual stream of a batch that grows: rows join it in front of layers.

        Args:
            joining: What enters a layer for the rows that join there, `[copies * row, pos - first, d_model]`, by layer,
                in the order of layers.
            first: The position of the whole sequence at which these start.
            hooks: Forward hooks of the run. At a layer where rows join they see these too.
            keep: See `continued`.
            in_one: Whether it is one forward; otherwise one from each layer where rows join to the next.

        Raises:
            UnfitForGrowth: The model cannot be run in one forward.
        """
        n_layers = len(self.model.blocks)
        if in_one:
            seen = self._seen(first)
            if seen is not None:
                with contextlib.suppress(UnfitForGrowth):
                    return self._grown_in_one(joining, first, hooks, keep, seen)
            return self._grown_in_one(joining, first, hooks, keep, self._given_to_blocks(first))
        residual, layer_of = None, self.model.index.layer_of
        for start, stop in itertools.pairwise([*joining, n_layers]):
            new = joining[start]
            residual = new if residual is None else torch.cat([residual, new.to(residual.device)])
            own = [(name, function) for name, function in hooks if layer_of(str(name)) in range(start, stop)]
            residual = self.continued(residual, start, stop, first, own, keep)
        assert residual is not None, "rows join at a layer or more"
        return residual

    def whole(self, copies: int, hooks: Hooks) -> Tensor:
        """Returns the logits of the whole model on the input, `copies` times over, with hooks."""
        value = {
            name: _repeated(self.given.kwargs[name], copies)
            for name in ("input_ids", "inputs_embeds")
            if self.given.kwargs.get(name) is not None
        }
        return self._run(value, None, None, 0, copies, hooks)

    def _kept(self, keep: Sequence[int] | None, residual: Tensor, stop: int) -> Sequence[int] | None:
        """Returns the positions on which the last MLP is run, or None for all."""
        is_shorter = keep is not None and stop == len(self.model.blocks) and len(keep) < residual.shape[1]
        return keep if is_shorter else None

    def _grown_in_one(
        self, joining: Mapping[int, Tensor], first: int, hooks: Hooks, keep: Sequence[int] | None, given: Given
    ) -> Tensor:
        """Returns what `grown` does, of one forward whose blocks are given what was seen."""
        model, start, n_layers = self.model, min(joining), len(self.model.blocks)
        rows = self.entering(start, first, 1)
        kept, modules = self._kept(keep, rows, n_layers), [block.module for block in model.blocks]
        growth = growing(modules, joining, self._extent(first), given, self._joined)
        return self._run({"inputs_embeds": rows}, start, n_layers, first, 1, hooks, kept, growth)

    def _extent(self, first: int) -> Extent:
        return Extent(self.rows, self.length - first, self.length)

    def _seen(self, first: int) -> Given | None:
        """Returns what is known of a run of the last positions: of one of this extent, or else of the last one seen."""
        return self.known.get(self._extent(first)) or next(iter(list(self.known.values())[-1:]), None)

    def _given_to_blocks(self, first: int) -> Given:
        """Finds out what the model gives its blocks from a position on; none of them is run."""
        model, n_layers, layer = self.model, len(self.model.blocks), min(self.residuals)

        def shapes(copies: int) -> Shapes:
            entering = self.entering(layer, first, copies)
            kwargs = self._kwargs({"inputs_embeds": entering}, n_layers, first, copies)
            run = functools.partial(run_segment, model, ModelInput(self.given.batch, kwargs), n_layers, None)
            return shapes_given([block.module for block in model.blocks], run)

        with model.taps.turns.unseen():
            given = self.known[self._extent(first)] = Given(self._extent(first), shapes(1), shapes(2))
        return given

    def read_out(self, residual: Tensor, first: int, hooks: Hooks) -> Tensor:
        """Returns the logits that the model makes of last residual streams, with hooks on what reads them out."""
        copies = len(residual) // self.rows
        return self._run({"inputs_embeds": residual}, len(self.model.blocks), None, first, copies, hooks)

    def _run(
        self,
        value: dict[str, Tensor],
        start: int | None,
        stop: int | None,
        first: int,
        copies: int,
        hooks: Hooks,
        keep: Sequence[int] | None = None,
        growth: contextlib.AbstractContextManager[None] | None = None,
    ) -> Tensor:
        model = self.model
        wanted = ModelInput(self.given.batch, self._kwargs(value, start, first, copies))
        mlp = None if keep is None else positionwise_mlp(model)
        with (
            model.taps.run(),
            unplanned(model.device),
            contextlib.nullcontext() if mlp is None or keep is None else narrowed(mlp.module, keep),
            attached(model, hooks, segment=(start, stop)) as listeners,
            contextlib.nullcontext() if growth is None else growth,
        ):
            output = run_segment(model, wanted, start, stop)
            check_fired(listeners)
        return output.residual if isinstance(output, Stopped) else output

    def _kwargs(self, value: Mapping[str, Tensor], start: int | None, first: int, copies: int) -> dict[str, Any]:
        """Returns what the model is given for so many copies of the input's rows, from a position on."""
        kwargs = {**without_kv_cache(self.given.kwargs), "use_cache": False}
        for name in ("input_ids", "inputs_embeds"):
            kwargs.pop(name, None)
        for name in ("attention_mask", "position_ids"):
            if name in kwargs:
                kept = kwargs[name] if name == "attention_mask" else kwargs[name][..., first:]
                kwargs[name] = _repeated(kept, copies)
        kwargs |= value
        ids = self.given.kwargs.get("input_ids")
        if start is not None and ids is not None:
            kwargs["input_ids"] = _repeated(ids[:, first:], copies)
        if first:
            assert self.prefix is not None, "a run of the last positions has keys and values of those before"
            kwargs |= {kv_cache_keyword(self.model.hf_model): self.prefix.cache(first), "use_cache": True}
        return kwargs

    def _joined(self, stream: Tensor | None, new: Tensor) -> Tensor:
        """Returns the stream that a block gets, as it takes it: what reaches it, if any, and rows that join."""
        block = self.model.blocks[0]
        return block.raw_stream(
            new if stream is None else torch.cat([block.shown_stream(stream), new.to(stream.device)])
        )


@no_grad
def base_run(
    model: Model,
    given: ModelInput,
    layers: Iterable[int],
    hooks: Hooks,
    *,
    with_prefix: bool,
    known: dict[Extent, Given] | None = None,
    beside: Mapping[str, Beside] = {},
) -> BaseRun:
    """Runs the model and returns what other runs continue from.

    Args:
        model: The model.
        given: Its input; no KV cache.
        layers: Layers whose residual stream is kept, one or more; `n_layers` for the last one.
        hooks: Forward hooks of this run, whose effect is part of it.
        with_prefix: Whether keys and values are kept.
        known: See `BaseRun`; by default nothing is known.
        beside: Inputs that are run in the same forward, by name. There are no hooks then, which would change these too.
    """
    if given.kv_cache is not None:
        raise InvalidArgumentError("a run that others continue has no KV cache of its own", got=KV_CACHE)
    assert not (hooks and beside), "hooks are those of the base run alone"
    n_layers, rows, others = len(model.blocks), given.size[0], list(beside.values())
    entries = {layer: model.blocks[layer].enters if layer < n_layers else model.blocks[-1].leaves for layer in layers}
    whole = given
    if others:
        whole = prepare(model, functools.reduce(Batch.joined, [other.batch for other in others], given.batch))
    kv_cache = empty() if with_prefix else None
    own = {} if kv_cache is None else {kv_cache_keyword(model.hf_model): kv_cache, "use_cache": True}
    wanted = ModelInput(whole.batch, {**whole.kwargs, **own})
    with model.taps.run(whole.sequence), unplanned(model.device), attached(model, hooks) as listeners:
        logits, cache = caching.run_with_cache(
            model,
            wanted,
            (None, None),
            "logits",
            False,
            names_filter=list(dict.fromkeys([*entries.values(), *(name for other in others for name in other.names)])),
            device=None,
            pos_slice=None,
            incl_bwd=False,
        )
        assert isinstance(logits, Tensor), "a run for logits returns them"
        check_fired(listeners)

    def part(number: int, names: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the values and logits of the rows of one input."""
        at = slice(number * rows, (number + 1) * rows)
        values = cache.apply_slice_to_batch_dim(at) if others else cache
        return {name: values[name] for name in names}, logits[at]

    values, own_logits = part(0, entries.values())
    runs = {}
    for number, (name, other) in enumerate(beside.items(), 1):
        found, its_logits = part(number, other.names)
        runs[name] = SourceRun(found, other.batch, its_logits)
    residuals = {layer: values[name] for layer, name in entries.items()}
    prefix = None if kv_cache is None else Prefix.of(kv_cache, rows)
    return BaseRun(model, given, residuals, prefix, own_logits, {} if known is None else known, runs)


def positionwise_mlp(model: Model) -> MLPBridge | None:
    """Returns an MLP of the last block that maps one tensor position by position, and that nothing after it reads.

    None where there is none, or its module takes more than the tensor.
    """
    last = model.blocks[-1]
    for sublayer in last.of_kind("mlp"):
        mlp = sublayer.part
        if isinstance(mlp, MLPBridge) and mlp.name is not None and sublayer.adds_at == len(last.stages) - 1:
            takes = list(inspect.signature(type(mlp.module).forward).parameters.values())
            return mlp if len(takes) == 2 and takes[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else None
    return None


def _copied(tensor: Tensor, copies: int) -> Tensor:
    """Returns rows `copies` times over, as a copy."""
    return tensor.repeat(copies, *[1] * (tensor.ndim - 1))


def _repeated(tensor: Tensor, copies: int) -> Tensor:
    """Returns rows `copies` times over; one row for all stays one where it is broadcast."""
    return tensor if copies == 1 else _copied(tensor, copies)


def check_undisturbed(model: Model) -> None:
    """Raises unless runs of a model are its own: in evaluation mode, and with no hooks on it.

    Raises:
        InvalidArgumentError: It is in training mode, or hooks are on it.
    """
    check_bridge(model)
    if model.hf_model.training:
        raise InvalidArgumentError(
            "runs are compared on a model in evaluation mode", got="training mode", fix="bridge.hf_model.eval()"
        )
    listening = next((point for point in model.index if point.is_heard), None) if model.taps.is_listening else None
    if listening is not None:
        raise InvalidArgumentError(
            "hooks are on the model, which would be called with the rows and positions of batches",
            where=listening.name,
            fix="bridge.reset_hooks(), or background=[...] for what is to be done in every cell",
        )
