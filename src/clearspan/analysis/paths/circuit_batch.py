"""One batch of circuits, run together: what each receiver reads, and what each sender adds in these runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clearspan._cache.readings import FrozenNorm
from clearspan._cache.stacks import WayOut
from clearspan.analysis.attribution.readout import exact
from clearspan.cache import ActivationCache
from clearspan.components import NormalizationBridge
from clearspan.points import HookFunction, HookPoint

from .graph import ComputationalGraph

Masks = Bool[Tensor, "circuit sender receiver"]
Stream = Float[Tensor, "row pos d_model"]
Writes = Float[Tensor, "*circuit sender row*pos*d_model"]


@dataclass(frozen=True, eq=False)
class CorruptedRun:
    """The run whose values are on all edges outside a circuit.

    Attributes:
        graph: The edges.
        cache: What its receivers read.
        mask: Padding mask.
        writes: What its senders add to the residual stream, in float32 at least.
    """

    graph: ComputationalGraph
    cache: ActivationCache
    mask: Int[Tensor, "row pos"] | None
    writes: Writes

    @classmethod
    def of(cls, graph: ComputationalGraph, cache: ActivationCache, mask: Int[Tensor, "row pos"] | None) -> Self:
        """Returns the run of a cache that has the points of `written`, and those of `streams_of`."""
        parts = [exact(cache["resid_pre", 0])[None]]
        for layer in range(graph.n_layers):
            parts += [head_writes(cache, layer, cache["z", layer]), exact(cache["mlp_out", layer])[None]]
        return cls(graph, cache, mask, torch.cat(parts).flatten(1))

    def stream(self, name: str) -> Stream:
        """Returns what is read at a hook point, by head or not."""
        layer, _, leaf = name.rpartition(".")
        is_by_head = leaf in ("hook_q_input", "hook_k_input", "hook_v_input")
        return self.cache[f"{layer}.hook_resid_pre" if is_by_head else name]


def streams_of(graph: ComputationalGraph) -> list[str]:
    """Returns the hook points of the residual stream at which receivers read it."""
    names = [f"blocks.{layer}.{name}" for layer in range(graph.n_layers) for name in ("hook_resid_pre", "hook_mlp_in")]
    return [*names, f"blocks.{graph.n_layers - 1}.hook_resid_post"]


def head_writes(
    cache: ActivationCache, layer: int, z: Float[Tensor, "row pos head d_head"], scale: Tensor | None = None
) -> Float[Tensor, "head row pos d_model"]:
    """Returns what heads add to the stream, after a norm on attention's output and a residual multiplier.

    Args:
        cache: A run of the model.
        layer: Theirs.
        z: Of the heads.
        scale: Of the norm, where it is not the one in the cache's run.
    """
    block = cache.bridge.blocks[layer]
    norm = block.submodules.get("ln1_post")
    frozen = FrozenNorm.of(cache, norm, scale) if isinstance(norm, NormalizationBridge) else None
    result = torch.einsum("bphd,hdm->hbpm", exact(z), exact(block.attn.W_O))
    return WayOut(frozen, block.residual_multiplier)(result)


@dataclass(eq=False)
class CircuitBatch:
    """Circuits that run together, each in rows of its own.

    The model's own residual stream does not matter: all that reads it is given what it reads.

    Attributes:
        corrupted: The corrupted run.
        masks: The circuits.
        changes: By how much more each sender adds than in the corrupted run, as far as it is known.
    """

    corrupted: CorruptedRun
    masks: Masks
    changes: Writes

    @classmethod
    def entering(cls, corrupted: CorruptedRun, masks: Masks, embedded: Stream) -> Self:
        """Returns a batch of which nothing is known but what the clean run's embeddings add."""
        changes = torch.zeros_like(corrupted.writes)
        changes[0] = exact(embedded).flatten() - corrupted.writes[0]
        return cls(corrupted, masks, changes.expand(len(masks), -1, -1))

    def last_streams(self) -> Float[Tensor, "circuit row pos d_model"]:
        """Returns the last residual stream of each circuit. Layers in which all agree are run once for all."""
        graph = self.corrupted.graph
        agreed = self._agreed()
        shared = CircuitBatch(self.corrupted, self.masks[:1], self.changes[:1].clone())
        shared._run(0, agreed)
        own = CircuitBatch(self.corrupted, self.masks, shared.changes.repeat(len(self.masks), 1, 1))
        own._run(agreed, graph.n_layers)
        return own._read(streams_of(graph)[-1], len(graph.receivers) - 1, 1)[:, 0]

    def _agreed(self) -> int:
        """Returns how many layers read the same in all circuits."""
        graph = self.corrupted.graph
        differs = (self.masks != self.masks[:1]).any(0).any(0).tolist()
        layers = [node.layer for node, is_other in zip(graph.receivers, differs, strict=True) if is_other]
        return min((graph.n_layers if layer is None else layer for layer in layers), default=graph.n_layers)

    def _run(self, start: int, stop: int) -> None:
        """Runs layers, after which the changes of their heads and MLPs are known."""
        if start == stop:
            return
        cache, mask, copies = self.corrupted.cache, self.corrupted.mask, len(self.masks)
        cache.bridge.run_with_hooks(
            cache["resid_pre", start].repeat(copies, 1, 1),
            fwd_hooks=[hook for layer in range(start, stop) for hook in self._hooks(layer)],
            start_at_layer=start,
            stop_at_layer=stop,
            attention_mask=None if mask is None else mask.repeat(copies, 1),
        )

    def _hooks(self, layer: int) -> Iterator[tuple[str, HookFunction]]:
        """Yields what is read and written in a layer."""
        graph = self.corrupted.graph
        heads, groups = graph.n_heads, graph.n_kv_heads
        first = layer * (heads + 2 * groups + 1)
        yield f"blocks.{layer}.hook_q_input", self._given(first, heads)
        yield f"blocks.{layer}.hook_k_input", self._given(first + heads, groups)
        yield f"blocks.{layer}.hook_v_input", self._given(first + heads + groups, groups)
        yield f"blocks.{layer}.hook_mlp_in", self._given(first + heads + 2 * groups)
        yield from self._head_hooks(layer)
        mlp = (layer + 1) * (heads + 1)

        def keep_mlp(value: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
            self._changed(mlp, exact(value)[None])

        yield f"blocks.{layer}.hook_mlp_out", keep_mlp

    def _head_hooks(self, layer: int) -> Iterator[tuple[str, HookFunction]]:
        """Yields what reads a layer's heads, and the scale of a norm on what they add, which comes after them."""
        cache, first = self.corrupted.cache, 1 + layer * (self.corrupted.graph.n_heads + 1)
        name, kept = f"blocks.{layer}.ln1_post.hook_scale", {}
        has_norm = name in cache.bridge.hook_dict

        def keep_heads(value: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
            kept["z"] = value
            if not has_norm:
                self._changed(first, head_writes(cache, layer, value))

        def keep_scale(value: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
            self._changed(first, head_writes(cache, layer, kept.pop("z"), exact(value)))

        yield f"blocks.{layer}.attn.hook_z", keep_heads
        if has_norm:
            yield name, keep_scale

    def _changed(self, first: int, writes: Float[Tensor, "sender circuit*row pos d_model"]) -> None:
        """Notes the changes of senders, from what they add."""
        own = writes.unflatten(1, (len(self.masks), -1)).flatten(2).transpose(0, 1)
        places = slice(first, first + len(writes))
        self.changes[:, places] = own - self.corrupted.writes[places]

    def _given(self, first: int, count: int | None = None) -> HookFunction:
        """Returns what writes the inputs of receivers: of one, or of as many as a point shows by head."""

        def write(value: Tensor, hook: HookPoint) -> Tensor:
            streams = self._read(hook.name, first, count or 1)
            by_row = streams[:, 0] if count is None else streams.movedim(1, 3)
            return by_row.flatten(0, 1).to(value)

        return write

    def _read(self, name: str, first: int, count: int) -> Float[Tensor, "circuit receiver row pos d_model"]:
        """Returns what receivers read that come next to each other and after the same senders."""
        graph = self.corrupted.graph
        before = graph.n_senders_before(graph.receivers[first])
        stream = exact(self.corrupted.stream(name))
        chosen = self.masks[:, :before, first : first + count].transpose(1, 2).to(self.changes)
        return stream + (chosen @ self.changes[:, :before]).unflatten(-1, stream.shape)
