"""GPTBigCode: GPT-2 with one key/value head (StarCoder 1, SantaCoder), or with as many as query heads."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from clearspan.architectures.adapter import ArchitectureAdapter, Sizes
from clearspan.architectures.gpt import GPT_SIZES, gpt2
from clearspan.architectures.parts import fused_attention, mlp
from clearspan.components import GeneralizedComponent
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import BlockedQKVConversionRule, GroupedQKVConversionRule, QKVConversionRule
from clearspan.conversions.qkv import wrong_rank
from clearspan.errors import UnreadableWeightError


class MQAQKVConversionRule(BlockedQKVConversionRule):
    """All query heads, then one key head and one value head: the fused axis is `[n_heads*d_head | d_head | d_head]`.

    Args:
        n_heads: Query heads.
        d_head: Width of a head.

    Example:
        >>> import torch
        >>> rule = MQAQKVConversionRule(n_heads=4, d_head=12)
        >>> rule.handle_conversion(torch.zeros(2, 7, 48)).shape
        torch.Size([2, 7, 4, 12])
        >>> rule.handle_conversion(torch.zeros(2, 7, 12)).shape
        torch.Size([2, 7, 1, 12])
    """

    def __init__(self, n_heads: int, d_head: int) -> None:
        super().__init__(n_heads, d_head, n_kv_heads=1)

    def handle_conversion(self, input_value: Tensor, *full_context: Tensor) -> Tensor:
        """Returns `[batch, pos, head, d_head]`: `n_heads` heads for queries, one for keys or values.

        The width decides; with one query head both are one head. A 4-D tensor is returned as it is.

        Raises:
            ValueError: The tensor is neither 3-D nor 4-D.
        """
        match input_value.ndim:
            case 3 if input_value.shape[-1] == self.n_heads * self.d_head:
                return input_value.unflatten(-1, (self.n_heads, self.d_head))
            case 3:
                return input_value.unsqueeze(-2)
            case 4:
                return input_value
            case _:
                raise wrong_rank(input_value)


class GPTBigCodeArchitectureAdapter(ArchitectureAdapter):
    """GPTBigCode (StarCoder 1, SantaCoder), with `multi_query` true or false.

    The model's code reads `multi_query` alone: one key and value for all query heads, or one for each, fused head by
    head. For sizes without a Hugging Face config, `n_key_value_heads` says it: 1 (or unknown) is multi-query.
    """

    sizes: ClassVar[Sizes] = GPT_SIZES
    default_cfg: ClassVar[dict[str, object]] = {"uses_split_attention": True}
    irrelevant: Mapping[str, str] = {"transformer.bias": "the causal mask"}

    @property
    def qkv_conversion_rule(self) -> QKVConversionRule:
        """How `c_attn`'s output holds queries, keys and values."""
        n_heads, d_head = self.cfg.n_heads, self.cfg.d_head
        if self.cfg.hf.get("multi_query", self.cfg.n_key_value_heads in (None, 1)):
            return MQAQKVConversionRule(n_heads, d_head)
        return GroupedQKVConversionRule(n_heads, d_head, n_kv_heads=n_heads)

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts."""
        attn = fused_attention(
            "attn",
            qkv="c_attn",
            o="c_proj",
            rule=self.qkv_conversion_rule,
            needs_mask=True,  # eager attention here is causal only by its mask
            split=self._split_qkv_matrix,
        )
        return gpt2(attn, mlp("mlp", in_="c_fc", out="c_proj"))

    def _split_qkv_matrix(self, attention: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Returns linear maps for queries, keys and values of a Hugging Face attention module.

        With one key/value head their parameters are views of `c_attn`'s rows. Rows fused head by head are not evenly
        spaced, so the parameters are copies; `W_Q`, `W_K` and `W_V` of the bound component are views in both cases.
        """
        fused = attention.get_submodule("c_attn")
        if type(fused) is not nn.Linear or not fused.weight.is_floating_point():
            raise UnreadableWeightError(
                "queries, keys and values cannot be taken apart",
                expected="a Linear with a weight of its own",
                got=f"{type(fused).__name__}, quantised, wrapped or with an adapter",
                where=f"c_attn of {type(attention).__name__}",
                fix="bridge.blocks[layer].attn.W_Q, W_K and W_V",
            )
        weights = self.qkv_conversion_rule.split(fused.weight.detach(), 0)
        biases = (None,) * 3 if fused.bias is None else self.qkv_conversion_rule.split(fused.bias.detach(), 0)
        q, k, v = (_linear(w, b, fused.weight.requires_grad) for w, b in zip(weights, biases, strict=True))
        return q, k, v


def _linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    rows = weight.reshape(-1, weight.shape[-1])
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(rows, requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.reshape(-1), requires_grad=requires_grad)
    return linear
