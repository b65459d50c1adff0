"""Attention that uses the keys and values of an earlier layer's attention, and projects queries alone."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components.attention import GeneralAttentionBridge, Projection
from clearspan.components.base import GeneralizedComponent
from clearspan.components.linear import LinearBridge
from clearspan.components.weights import AbsentWeight, Weight, write_through
from clearspan.conversions import HeadsConversion
from clearspan.points import Access, Converted, HookPoint, Place, Side

_NO_MAP = "the layer attends to an earlier layer's keys and values, which alone has their maps: `source` says which"


@dataclass(eq=False, repr=False)
class SharedKeysAttentionBridge(GeneralAttentionBridge):
    """Attention to the keys and values of an earlier layer (Gemma 3n, Gemma 4): submodules `q` and `o`.

    `hook_rot_k` and `hook_v` are the keys and values that it multiplies, those of all tokens where there is a KV cache;
    a write there changes this layer alone. A write to `hook_k` or `hook_v` of the layer that they come from reaches all
    layers that use them.

    Attributes:
        source: The layer that they come from.
    """

    _: KW_ONLY
    source: int

    @property
    def why_not_alone(self) -> str:
        """Why it cannot run alone."""
        return f"{self.path} attends to keys and values of layer {self.source}"

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the map of queries and the output projection."""
        return dict.fromkeys(("q", "o"), LinearBridge)

    def first_map(self, projection: Projection) -> LinearBridge:
        """Returns the map of queries, the only one."""
        part = self.submodules["q"]
        assert isinstance(part, LinearBridge), "queries come from a linear map"
        return part

    @property
    def path_projections(self) -> tuple[Projection, ...]:
        """Queries alone."""
        return ("q",)

    def projected(self, projection: Projection) -> tuple[Place, Access]:
        """Returns the map's output."""
        return self.first_map("q").place(Side.OUTPUT), Converted(HeadsConversion(self.n_heads))

    def _projection_points(self) -> Iterator[HookPoint]:
        yield self.point("hook_q", *self.projected("q"), dimensions=self._query_axes)
        axes = "batch pos kv_head d_head" if self.d_head_v is None else "batch pos kv_head d_head_v"
        yield self.point("hook_v", self.inside(Side.VALUE), dimensions=axes)

    def _rotary_points(self) -> Iterator[HookPoint]:
        if self.has_rotary or self.scales_queries or "q_norm" in self.submodules:
            yield self.point("hook_rot_q", self.inside(Side.QUERY), dimensions=self._query_axes)
        yield self.point("hook_rot_k", self.inside(Side.KEY), dimensions=self._key_axes)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields keys as projected, and what keys and values read."""
        block = self.path.rpartition(".")[0]
        why = f"it attends to keys and values of layer {self.source}"
        yield f"{self.path}.hook_k", f"{why}: blocks.{self.source}.attn.hook_k; hook_rot_k has them as multiplied"
        for name in ("hook_attn_in", "hook_k_input", "hook_v_input"):
            yield f"{block}.{name}", f"{why}: blocks.{self.source}.{name}"
        for name in ("hook_scale", "hook_normalized"):
            yield f"{self.path}.k_norm.{name}", f"{why}: blocks.{self.source}.attn.k_norm.{name}"

    def project(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns queries by head for an input by head, `[batch, pos, head, d_model]`."""
        made = torch.einsum("bphm,hmd->bphd", value, self.W_Q)
        return made + self.b_Q if self.first_map("q").bias_or_none() is not None else made

    @Weight
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """The query weight `[head, d_model, d_head]`, a view of the live parameter."""
        return self.first_map("q").matrix.unflatten(0, (self.n_heads, -1)).transpose(1, 2)

    @Weight
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """The query bias `[head, d_head]`, a view of the live parameter."""
        bias = self.first_map("q").weight("bias")
        return write_through(bias.reshape(self.n_heads, -1), bias, lambda shown: shown.reshape(bias.shape))

    W_K = AbsentWeight(_NO_MAP)
    W_V = AbsentWeight(_NO_MAP)
    b_K = AbsentWeight(_NO_MAP)
    b_V = AbsentWeight(_NO_MAP)
