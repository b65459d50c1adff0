"""What an adapter is: one family's parts and layouts, as data. It contains no forward code."""

from typing import ClassVar

from clearspan.components import GeneralizedComponent
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import ParamProcessingConversion, RearrangeTensorConversion


class ArchitectureAdapter:
    """Says where each canonical part of a family lives, and how its tensors convert.

    Subclasses set `config_values`, `default_cfg`, and in `__init__` the mapping and the conversions.

    Attributes:
        cfg: The model's sizes, with the family's values set.
        component_mapping: Canonical names to component templates.
        weight_processing_conversions: Canonical weight names, with `{i}` for the layer, to conversions.

    Args:
        cfg: The model's sizes; the adapter sets the family's values on it.
    """

    config_values: ClassVar[dict[str, object]] = {}
    """Fields of `TransformerBridgeConfig` that the family fixes."""
    default_cfg: ClassVar[dict[str, object]] = {}
    """Further fields, as options of how the family is shown."""
    uses_combined_qkv: ClassVar[bool] = False
    """Whether one linear map gives queries, keys and values."""
    makes_positions_from_mask: ClassVar[bool] = False
    """Whether the model itself numbers positions by the padding mask."""
    whole_sequences: ClassVar[str | None] = None
    """Why a run cannot go on after the first positions from their keys and values, or None where it can."""
    component_mapping: dict[str, GeneralizedComponent]
    weight_processing_conversions: dict[str, ParamProcessingConversion]

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        self.cfg = cfg
        cfg.update({**self.config_values, **self.default_cfg})

    def _qkvo_weight_conversions(
        self, n_kv_heads: int, rows: str = "(n h)", query_groups: int = 1
    ) -> dict[str, ParamProcessingConversion]:
        """Returns the conversions of attention's four weights, `[out, in]` to canonical axes.

        Args:
            n_kv_heads: Key and value heads.
            rows: The rows of the query, key and value weights as an einops pattern: joined, or already by head.
            query_groups: Groups in which the rows of the query weight lie, where there is an axis of them.
        """
        heads = {"q": self.cfg.n_heads, "k": n_kv_heads, "v": n_kv_heads}
        conversions = {
            f"blocks.{{i}}.attn.{key}.weight": RearrangeTensorConversion(f"{rows} m -> n m h", n=n)
            for key, n in heads.items()
        }
        if query_groups > 1:
            conversions["blocks.{i}.attn.q.weight"] = RearrangeTensorConversion("g n h m -> (g n) m h", g=query_groups)
        conversions["blocks.{i}.attn.o.weight"] = RearrangeTensorConversion("m (n h) -> n h m", n=self.cfg.n_heads)
        return {name: ParamProcessingConversion(conversion) for name, conversion in conversions.items()}
