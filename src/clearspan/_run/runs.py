"""The runs of a model: its forward, with hooks and interventions, with a cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clearspan._cache.slices import PosSlice
from clearspan._forward import forward as model_forward
from clearspan._forward.forward import ReturnType, gradients_lost
from clearspan._forward.given import ModelInput, prepare, resolve_segment
from clearspan._run import caching
from clearspan._run.caching import Scalar
from clearspan._run.hooks import Hooks, attached, check_fired, check_recomputation, edits
from clearspan._run.sources import Source
from clearspan.cache import ActivationCache
from clearspan.checks import check_flags
from clearspan.index import Segment
from clearspan.inputs import Input
from clearspan.interventions import Intervention
from clearspan.interventions.intervention import interventions_of
from clearspan.model import Model
from clearspan.points import NamesFilter


def prepared(
    model: Model,
    input: Input | None = None,
    *,
    start_at_layer: int | None = None,
    stop_at_layer: int | None = None,
    **forward_kwargs: Any,
) -> tuple[ModelInput, Segment]:
    """Returns what a run gives the model, checked, and the part of the model that it runs."""
    segment = resolve_segment(model, start_at_layer, stop_at_layer)
    return prepare(model, input, is_residual=start_at_layer is not None, **forward_kwargs), segment


def forward(
    model: Model,
    input: Input | None = None,
    return_type: ReturnType | None = "logits",
    loss_per_token: bool = False,
    *,
    interventions: Sequence[Intervention] = (),
    sources: Mapping[str, Source] | None = None,
    **forward_kwargs: Any,
) -> Any:
    """Runs the model. The arguments are those of `TransformerBridge.forward`."""
    if interventions_of(interventions):
        return run_with_hooks(
            model,
            input,
            interventions=interventions,
            sources=sources,
            return_type=return_type,
            loss_per_token=loss_per_token,
            **forward_kwargs,
        )
    given, segment = prepared(model, input, **forward_kwargs)
    with model.taps.run(given.sequence):
        return model_forward.run(model, given, segment, return_type, loss_per_token)


def run_with_hooks(
    model: Model,
    input: Input | None = None,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
    reset_hooks_end: bool = True,
    clear_contexts: bool = False,
    return_type: ReturnType | None = "logits",
    loss_per_token: bool = False,
    *,
    interventions: Sequence[Intervention] = (),
    sources: Mapping[str, Source] | None = None,
    **forward_kwargs: Any,
) -> Any:
    """Runs the model with hooks of this run, each of which must fire.

    The arguments are those of `TransformerBridge.run_with_hooks`.
    """
    model.taps.check_not_in_hook()
    given, segment = prepared(model, input, **forward_kwargs)
    fwd_hooks = edits(model, fwd_hooks, interventions, sources, given.sequence)
    check_flags(reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts)
    with (
        model.taps.run(given.sequence) as run,
        attached(
            model,
            fwd_hooks,
            bwd_hooks,
            segment=segment,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
        ) as listeners,
    ):
        run.refuse_writes = lost = gradients_lost(model)
        check_recomputation(listeners, lost)
        output = model_forward.run(model, given, segment, return_type, loss_per_token)
        check_fired(listeners)
        return output


def run_with_cache(
    model: Model,
    input: Input | None = None,
    names_filter: NamesFilter = None,
    device: torch.device | str | None = None,
    pos_slice: PosSlice = None,
    incl_bwd: bool | Scalar = False,
    remove_batch_dim: bool = False,
    return_type: ReturnType | None = "logits",
    loss_per_token: bool = False,
    *,
    fwd_hooks: Hooks = (),
    interventions: Sequence[Intervention] = (),
    sources: Mapping[str, Source] | None = None,
    **forward_kwargs: Any,
) -> tuple[Any, ActivationCache]:
    """Runs the model and keeps its activations. The arguments are those of `TransformerBridge.run_with_cache`."""
    check_flags(remove_batch_dim=remove_batch_dim)
    given, segment = prepared(model, input, **forward_kwargs)
    own = edits(model, fwd_hooks, interventions, sources, given.sequence)
    with model.taps.run(given.sequence), attached(model, own, segment=segment) as listeners:
        output, cache = caching.run_with_cache(
            model,
            given,
            segment,
            return_type,
            loss_per_token,
            names_filter=names_filter,
            device=device,
            pos_slice=pos_slice,
            incl_bwd=incl_bwd,
        )
        check_fired(listeners)
    return output, cache.remove_batch_dim() if remove_batch_dim else cache
