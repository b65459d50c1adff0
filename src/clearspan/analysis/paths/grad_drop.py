"""GradDrop: gradients of a run with those through one layer's sublayers dropped, layer by layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clearspan.points import HookFunction, HookPoint

from .patching_pair import PatchingPair, PatchingRun
from .patching_unit import Gradients


def dropped_gradients(pair: PatchingPair, names: Sequence[str], source: PatchingRun) -> Iterator[Gradients]:
    """Yields, for each layer, the metric's gradients at the base run when none flows through what that layer adds.

    The base is run once, and goes back once for each layer, with the gradients at the outputs of its attention and MLP
    set to zero. So effects that go through them, which may cancel others, are left out.

    Args:
        pair: The runs.
        names: Hook points whose gradients are wanted.
        source: The other run.
    """
    n_layers = pair.bridge.cfg.n_layers
    dropped: set[int] = set()
    found: dict[str, Tensor] = {}
    leaf = torch.zeros(*pair.base.shape, pair.bridge.cfg.d_model, requires_grad=True)

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        found[hook.name] = gradient

    def drop(layer: int) -> HookFunction:
        return lambda gradient, hook: torch.zeros_like(gradient) if layer in dropped else None

    sublayers = [(layer, part) for layer in range(n_layers) for part in ("attn", "mlp")]
    with torch.enable_grad():
        output = pair.bridge.run_with_hooks(
            pair.base,
            attention_mask=pair.mask,
            stop_at_layer=pair.stop,
            fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value + leaf.to(value))],
            bwd_hooks=[
                *((name, keep) for name in names),
                *((f"blocks.{layer}.hook_{part}_out", drop(layer)) for layer, part in sublayers),
            ],
        )
        total = pair.on_graph(output, source).sum()
    for layer in range(n_layers):
        dropped.clear()
        dropped.add(layer)
        found.clear()
        torch.autograd.grad(total, leaf, retain_graph=True)
        yield dict(found)
