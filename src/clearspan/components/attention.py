"""Attention: queries, keys, values, scores, patterns and what each head adds."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clearspan.components.base import GeneralizedComponent, causal_mask
from clearspan.components.linear import LinearBridge
from clearspan.conversions import HeadsConversion, QKVConversionRule, QKVPartConversion
from clearspan.errors import ConflictingWritesError, MissingWeightError
from clearspan.points import Converted, Derivation, Derived, HookPoint, Place, Side

Projection = Literal["q", "k", "v"]


class JointQKVAttentionBridge(GeneralizedComponent):
    """Attention whose queries, keys and values come from one linear map: submodules `qkv` and `o`.

    Args:
        name: The module's path.
        config: Settings of its own, if any.
        split_qkv_matrix: Gives three linear maps for a Hugging Face attention module.
        qkv_conversion_rule: How the fused axis holds queries, keys and values, and their heads.
        requires_attention_mask: Whether the module masks causally only when it is handed a mask.
        attention_mask_4d: Whether that mask must be the additive `[batch, 1, q_pos, k_pos]`.
        submodules: `qkv` and `o`.
    """

    hook_q: HookPoint
    hook_k: HookPoint
    hook_v: HookPoint
    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    hook_z: HookPoint
    hook_result: HookPoint
    qkv: LinearBridge
    o: LinearBridge

    def __init__(
        self,
        name: str | None = None,
        config: object | None = None,
        *,
        split_qkv_matrix: Callable[[nn.Module], tuple[nn.Linear, nn.Linear, nn.Linear]],
        qkv_conversion_rule: QKVConversionRule,
        requires_attention_mask: bool = False,
        attention_mask_4d: bool = False,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
    ) -> None:
        super().__init__(name, config, submodules)
        self.split_qkv_matrix = split_qkv_matrix
        self.qkv_conversion_rule = qkv_conversion_rule
        self.requires_attention_mask = requires_attention_mask
        self.attention_mask_4d = attention_mask_4d

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.cfg.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads."""
        return self.cfg.n_key_value_heads or self.cfg.n_heads

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """The query weight `[head, d_model, d_head]`, a view of the live parameter."""
        return self._projection_weight("q")

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """The key weight `[kv_head, d_model, d_head]`, a view of the live parameter."""
        return self._projection_weight("k")

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """The value weight `[kv_head, d_model, d_head]`, a view of the live parameter."""
        return self._projection_weight("v")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """The output weight `[head, d_head, d_model]`, a view of the live parameter."""
        return self._converted("o", self.o.weight("weight"))

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """The query bias `[head, d_head]`, a view of the live parameter."""
        return self._projection_bias("q")

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """The key bias `[kv_head, d_head]`, a view of the live parameter."""
        return self._projection_bias("k")

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """The value bias `[kv_head, d_head]`, a view of the live parameter."""
        return self._projection_bias("v")

    @property
    def b_O(self) -> Float[Tensor, "d_model"]:
        """The output bias `[d_model]`, the live parameter."""
        return self.o.weight("bias")

    def _projection_weight(self, projection: Projection) -> Tensor:
        parts = self.qkv_conversion_rule.split(self.qkv.weight("weight"), 0)
        return self._converted(projection, parts[get_args(Projection).index(projection)])

    def _projection_bias(self, projection: Projection) -> Tensor:
        part = self.qkv_conversion_rule.split(self.qkv.weight("bias"), 0)[get_args(Projection).index(projection)]
        return part.reshape(-1, self.cfg.d_head)

    def _converted(self, key: str, weight: Tensor) -> Tensor:
        layer = self.path.split(".")[1]
        template = self.path.replace(f".{layer}.", ".{i}.", 1)
        return self._bound.weight_conversions[f"{template}.{key}.weight"].convert(weight)

    def projection(self, value: Tensor, projection: Projection) -> Tensor:
        """Returns queries, keys or values by head for an input by head, `[batch, pos, head, d_model]`."""
        projected = torch.einsum("bphm,hmd->bphd", value, self._projection_weight(projection))
        try:
            return projected + self._projection_bias(projection)
        except MissingWeightError:
            return projected

    def call_arguments(self, value: Tensor) -> dict[str, Tensor]:
        """Returns the causal mask, where the module masks only by one; or a mask that hides nothing."""
        if not self.requires_attention_mask:
            return {}
        if not self.attention_mask_4d:
            return {"attention_mask": torch.ones(value.shape[:2], dtype=torch.long, device=value.device)}
        return {"attention_mask": causal_mask(value.shape[1], value.dtype, value.device)}

    def points(self) -> Iterator[HookPoint]:
        """Yields the points from the projections to the heads' results."""
        fused, joined = self.qkv.place(Side.OUTPUT), self.o.place(Side.INPUT)
        rule = self.qkv_conversion_rule
        yield HookPoint(f"{self.path}.qkv.hook_out", ("batch", "pos", "width"), fused)
        yield self.point("hook_q", "batch pos head d_head", fused, Converted(QKVPartConversion(rule, "q")))
        yield self.point("hook_k", "batch pos kv_head d_head", fused, Converted(QKVPartConversion(rule, "k")))
        yield self.point("hook_v", "batch pos kv_head d_head", fused, Converted(QKVPartConversion(rule, "v")))
        yield self.point("hook_attn_scores", "batch head q_pos k_pos", self.place(Side.SCORES))
        yield self.point("hook_pattern", "batch head q_pos k_pos", self.place(Side.PATTERN))
        yield self.point("hook_z", "batch pos head d_head", joined, Converted(HeadsConversion(self.n_heads)))
        yield HookPoint(f"{self.path}.o.hook_in", ("batch", "pos", "d_model"), joined)
        yield self.point("hook_result", "batch pos head d_model", joined, Derived(HeadResults(self), "result"))


class HeadResults(Derivation):
    """Each head's own contribution, `z @ W_O[head]`; a write acts on the output projection's output."""

    def __init__(self, attention: JointQKVAttentionBridge) -> None:
        self.attention = attention
        self.target: Place = attention.o.place(Side.OUTPUT)

    def weights(self) -> tuple[Tensor, ...]:
        """Returns the output weight."""
        return (self.attention.o.weight("weight"),)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns `[batch, pos, head, d_model]`."""
        z = source.unflatten(-1, (self.attention.n_heads, -1))
        return torch.einsum("bphd,hdm->bphm", z, self.attention.W_O.to(z))

    def write(self, output: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the sum of the edited results, plus the output bias."""
        total = edits["result"].sum(-2)
        bias = self.attention.o.bias_or_none()
        return total if bias is None else total + bias


class PathInputs(Derivation):
    """The residual stream as read by groups of heads and by single projections; a write acts on those projections.

    Parts, in order: `attn_in` by key/value group, then `q_input`, `k_input`, `v_input`, which see its edits.

    Args:
        attention: The attention that reads.
        norm: The norm through which it reads, or None.
    """

    is_in_series = False

    def __init__(self, attention: JointQKVAttentionBridge, norm: Callable[[Tensor], Tensor] | None) -> None:
        self.attention = attention
        self.norm = norm
        self.target: Place = attention.qkv.place(Side.OUTPUT)

    def read(self, part: str, source: Tensor, edits: Mapping[str, Tensor]) -> Tensor:
        """Returns `[batch, pos, kv_head, d_model]`, or `[batch, pos, head, d_model]` for queries: views, expanded."""
        group = edits.get("attn_in")
        heads = self.attention.n_heads if part == "q_input" else self.attention.n_kv_heads
        if group is None:
            return source.unsqueeze(2).expand(-1, -1, heads, -1)
        return group.repeat_interleave(heads // group.shape[2], dim=2)

    def write(self, output: Tensor, source: Tensor, edits: Mapping[str, Tensor], entered: Tensor) -> Tensor:
        """Returns the fused projections, with those recomputed whose input was edited.

        Raises:
            ConflictingWritesError: The norm or the attention's input was written in the same run: the projections
                recomputed here would not see it.
        """
        if not torch.allclose(entered, self._normalized(source), rtol=0, atol=0, equal_nan=True):
            raise ConflictingWritesError(
                "a head's or projection's own input was written, and what all of them read after the norm as well",
                where=self.attention.path,
                fix="write the inputs alone, or hook_q, hook_k, hook_v, which come after both",
            )
        for projection in get_args(Projection):
            part = f"{projection}_input"
            if part in edits or "attn_in" in edits:
                value = edits[part] if part in edits else self.read(part, source, edits)
                projected = self.attention.projection(self._normalized(value), projection)
                output = QKVPartConversion(self.attention.qkv_conversion_rule, projection).revert(projected, output)
        return output

    def _normalized(self, value: Tensor) -> Tensor:
        return value if self.norm is None else self.norm(value)
