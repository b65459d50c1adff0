"""Multi-head latent attention: keys and values of all heads come from one low-rank projection (DeepSeek)."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from clearspan.components.attention import GeneralAttentionBridge, Projection
from clearspan.components.base import GeneralizedComponent
from clearspan.components.linear import LinearBridge
from clearspan.components.normalization import NormalizationBridge
from clearspan.components.weights import AbsentWeight, LinearMap, Weight, WeightTensor
from clearspan.conversions import HeadPartConversion, HeadsConversion
from clearspan.errors import MissingWeightError, UnwritableError
from clearspan.points import Access, Converted, HookPoint, Place, Side

_SHARED = "keys and values of all heads come from one latent projection"


@dataclass(eq=False, repr=False)
class LatentAttentionBridge(GeneralAttentionBridge):
    """Multi-head latent attention: submodules `kv_a`, `kv_a_norm`, `kv_b`, `o`, and `q` or `q_a`, `q_a_norm`, `q_b`.

    A part `k_rope_norm` is a norm of the keys' rotary part, before it is rotated (dots3).

    `hook_q` is the last query projection by head, `hook_v` the value part of `kv_b`'s output, `hook_rot_k` the full key
    of each head. The model keeps latents in its KV cache and projects those of all tokens at each step, so `hook_v`
    then shows all tokens.

    Attributes:
        d_head_nope: Channels of a head's query and key that are not rotated; they come first.
        d_head_rope: Channels that are rotated.
        d_head_v: Channels of a head's value.
        latent_multiplier: What the model multiplies the normed latent by before `kv_b` (LongCat).
        query_multiplier: The same of the queries' latent before `q_b` (dots3).
        joins_query_latent: Whether `q_b` reads the queries' latent too, after its norm's output (A.X K2).
    """

    _: KW_ONLY
    d_head_nope: int
    d_head_rope: int
    latent_multiplier: float = 1.0
    query_multiplier: float = 1.0
    joins_query_latent: bool = False
    has_rotary: bool = True

    kv_a: LinearBridge = field(init=False)
    kv_b: LinearBridge = field(init=False)
    _query_axes = "batch pos head d_head_qk"
    _key_axes = "batch pos head d_head_qk"
    _value_axes = "batch pos head d_head_v"

    def required(self) -> Mapping[str, type[GeneralizedComponent]]:
        """Returns the maps and norms of queries, keys and values, and the output projection."""
        queries: dict[str, type[GeneralizedComponent]] = {"q": LinearBridge}
        if "q" not in self.submodules:
            queries = {"q_a": LinearBridge, "q_a_norm": NormalizationBridge, "q_b": LinearBridge}
        return {
            **queries,
            "kv_a": LinearBridge,
            "kv_a_norm": NormalizationBridge,
            "kv_b": LinearBridge,
            "o": LinearBridge,
        }

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of axes, including the heads' widths."""
        return {**super().sizes(), "d_head_qk": self.d_head_qk, "d_head_v": self.value_width}

    @property
    def value_width(self) -> int:
        """How many channels a head's value has."""
        assert self.d_head_v is not None, "its builder asks for it"
        return self.d_head_v

    @property
    def _query_map(self) -> GeneralizedComponent:
        return self._last_query

    @property
    def _gate_width(self) -> int | None:
        return self.value_width

    @property
    def d_head_qk(self) -> int:
        """Channels of a head's query and key."""
        return self.d_head_nope + self.d_head_rope

    def _of_queries(self, rows: Tensor) -> Tensor:
        """Returns the rows of queries `[head, d_head_qk, rank]` of the last map's, which may have a gate's too."""
        return rows.unflatten(0, (self.n_heads, -1))[:, : self.d_head_qk]

    @property
    def _last_query(self) -> LinearBridge:
        part = self.submodules["q_b" if "q_b" in self.submodules else "q"]
        assert isinstance(part, LinearBridge), "queries come from a linear map"
        return part

    def first_map(self, projection: Projection) -> LinearBridge:
        """Returns the map of queries (the first one of two), or that of keys and values to their latents."""
        part = self.submodules.get("q_a", self._last_query) if projection == "q" else self.submodules["kv_a"]
        assert isinstance(part, LinearBridge), "queries, keys and values come from linear maps"
        return part

    @property
    def path_projections(self) -> tuple[Projection, ...]:
        """Queries alone: keys and values share their latents."""
        return ("q",)

    def projected(self, projection: Projection) -> tuple[Place, Access]:
        """Returns the last query projection, or the value part of the key/value up-projection."""
        if projection == "q":
            whole, heads = HeadsConversion(self.n_heads), self.n_heads
            shown = HeadPartConversion(heads, 0, self.d_head_qk) if self.gate_in_queries else whole
            return self._last_query.place(Side.OUTPUT), Converted(shown)
        values = HeadPartConversion(self.n_heads, self.d_head_nope, self.value_width)
        return self.kv_b.place(Side.OUTPUT), Converted(values)

    def _projection_points(self) -> Iterator[HookPoint]:
        yield self.point("hook_q", *self.projected("q"), dimensions=self._query_axes)
        yield self.point("hook_v", *self.projected("v"), dimensions=self._value_axes)

    def absences(self) -> Iterator[tuple[str, str]]:
        """Yields keys, and inputs of keys and values, which heads share."""
        yield f"{self.path}.hook_k", "a key's rotary part is shared by all heads; hook_rot_k is the full key"
        block = self.path.rpartition(".")[0]
        for name in ("hook_attn_in", "hook_k_input", "hook_v_input"):
            yield f"{block}.{name}", _SHARED

    def reads(self) -> Iterator[LinearMap]:
        """Yields the first maps of queries, keys and values, and a gate's; the second ones read latents."""
        for key in ("q", "q_a", "kv_a", "gate"):
            part = self.submodules.get(key)
            if isinstance(part, LinearBridge):
                yield part.map

    def before_heads(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns the low-rank query of an input, if queries have one."""
        if "q_b" not in self.submodules:
            return value
        latent = self.submodules["q_a"].module.forward(value)
        normed = self.submodules["q_a_norm"].module.forward(latent)
        if self.query_multiplier != 1:
            normed = normed * self.query_multiplier
        return torch.cat([normed, latent], dim=-1) if self.joins_query_latent else normed

    def project(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns queries by head for an input by head, `[batch, pos, head, d_model]`."""
        by_head = self._of_queries(self._last_query.matrix)
        return torch.einsum("bphr,hdr->bphd", self.before_heads(value, projection), by_head)

    W_K = AbsentWeight("a key's rotary part is shared by all heads, and a norm lies in the rest's way")
    b_Q = AbsentWeight("the last query projection has no bias")
    b_K = AbsentWeight("the key projection has no bias")
    b_V = AbsentWeight("the value projection has no bias")

    @Weight
    def W_Q(self) -> Float[Tensor, "head d_model d_head_qk"]:
        """The query weight `[head, d_model, d_head_qk]`, a view.

        Raises:
            MissingWeightError: Queries have a low-rank part, with a norm between its two projections.
        """
        if "q_b" in self.submodules:
            reason = "a norm lies between the two query projections, so no one matrix is their map"
            raise MissingWeightError(f"{self.path} has no W_Q", reason=reason)
        return self._of_queries(self._last_query.matrix).transpose(1, 2)

    @Weight
    def W_V(self) -> Float[Tensor, "head d_model d_head_v"]:
        """The composed value weight `[head, d_model, d_head_v]`, a copy that refuses writes.

        It is the value rows of `kv_b` times the norm's weight times the latent rows of `kv_a`, and what the model
        multiplies latents by: it maps the input to a value, up to the norm's scale at each position.
        """
        norm, rank = self.submodules["kv_a_norm"].weight("weight"), self.kv_b.widths[0]
        rows = self.kv_b.matrix.unflatten(0, (self.n_heads, -1))[:, self.d_head_nope :]
        composed = torch.einsum("hvr,r,rm->hmv", rows, norm, self.kv_a.matrix[:rank])
        return WeightTensor.of(composed * self.latent_multiplier, before=self._refuse_composed)

    def _refuse_composed(self) -> None:
        raise UnwritableError(
            f"W_V of {self.path} is the product of three parameters, and what was read is a copy",
            fix="write kv_a.weight('weight'), kv_a_norm.weight('weight') or kv_b.weight('weight')",
        )
