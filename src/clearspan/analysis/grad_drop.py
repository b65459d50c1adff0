"""GradDrop: gradients of a run with those through one layer's sublayers dropped, layer by layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clearspan.points import HookFunction, HookPoint

from .patching_pair import PatchingPair, PatchingRun
from .patching_unit import Gradients


def dropped_gradients(
    pair: PatchingPair, names: Sequence[str], source: PatchingRun
) -> Iterator[tuple[int, Gradients]]:
    """Yields each layer, with the gradients of the metric at the base run when none flows through that layer's parts.

    The base is run once. In each backward, the gradients at what one layer's attention and MLP add are zero, so that
    effects which go through them, and may cancel others, are left out.

    Args:
        pair: The runs.
        names: Hook points whose gradients are wanted.
        source: The other run.

    References:
        Kramár et al. (2024), arXiv:2403.00745, section 3.2.
    """
    n_layers = pair.bridge.cfg.n_layers
    dropped: list[int] = []
    found: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        found[hook.name] = gradient

    def drop(layer: int) -> HookFunction:
        return lambda gradient, hook: torch.zeros_like(gradient) if layer in dropped else None

    parts = [(f"blocks.{layer}.hook_{part}_out", layer) for layer in range(n_layers) for part in ("attn", "mlp")]
    rows, positions = pair.base.shape
    leaf = torch.zeros(rows, positions, pair.bridge.cfg.d_model, dtype=pair.bridge.hf_model.dtype, requires_grad=True)
    entering = ("blocks.0.hook_resid_pre", lambda value, hook: value + leaf.to(value.device))
    with (
        torch.enable_grad(),
        pair.bridge.hooks(
            fwd_hooks=[entering],
            bwd_hooks=[*((name, keep) for name in names), *((name, drop(layer)) for name, layer in parts)],
        ),
    ):
        total = pair.on_graph(pair.bridge(pair.base, attention_mask=pair.mask), source).sum()
        for layer in range(n_layers):
            dropped[:] = [layer]
            found.clear()
            torch.autograd.grad(total, leaf, retain_graph=True)
            yield layer, dict(found)
