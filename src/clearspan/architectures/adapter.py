"""What an adapter is: one family's parts and layouts, as data without forward code; and what makes one."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Protocol, runtime_checkable

from clearspan.architectures.implied import implied, layers_of, weight_conversions
from clearspan.components import GeneralizedComponent, JointQKVAttentionBridge
from clearspan.config import TransformerBridgeConfig
from clearspan.conversions import ParamProcessingConversion

Size = tuple[str, ...] | int | float | str | None
"""Entries of a model's config, of which the first that is set counts; or the value itself."""
Sizes = Mapping[str, Size]
"""For fields of `TransformerBridgeConfig`, where they come from."""

FRAME_SIZES: Sizes = {
    "d_model": ("hidden_size",),
    "n_heads": ("num_attention_heads",),
    "n_layers": ("num_hidden_layers",),
    "d_vocab": ("vocab_size",),
}
"""The common names of what nearly every config has; transformers maps them to a family's own."""

SIZES: Mapping[str, tuple[str, ...]] = {
    "n_ctx": ("max_position_embeddings", "max_seq_len", "seq_length"),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "act_fn": ("hidden_act", "activation_function", "hidden_activation", "activation"),
    "eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "n_key_value_heads": ("num_key_value_heads",),
}
"""Where sizes come from that a family does not speak of."""


def entries(
    *,
    n_ctx: str,
    eps: str | None = None,
    act_fn: str | None = None,
    d_mlp: str | None = None,
    d_head: str | None = None,
    n_key_value_heads: str | None = None,
) -> Sizes:
    """Returns the `sizes` of a family: by what names its code reads them from the config.

    Args:
        n_ctx: Most positions of one input.
        eps: What norms add to the variance, or None where the config does not choose it.
        act_fn: The activation function, or None where the config does not choose it.
        d_mlp: Width of an MLP, or None where it is `4 * d_model`.
        d_head: Width of a head, or None where heads share `d_model` evenly, whatever the config says.
        n_key_value_heads: Key and value heads, or None where each query head has its own, whatever the config says.

    Example:
        >>> entries(n_ctx="n_positions", eps="layer_norm_epsilon", d_mlp="n_inner")["d_mlp"]
        ('n_inner',)
    """
    named = {
        "n_ctx": n_ctx,
        "eps": eps,
        "act_fn": act_fn,
        "d_mlp": d_mlp,
        "d_head": d_head,
        "n_key_value_heads": n_key_value_heads,
    }
    return {field: () if name is None else (name,) for field, name in named.items()}


@runtime_checkable
class AdapterSource(Protocol):
    """What makes a model's adapter of its sizes: an adapter's class, or an object that can be called like one.

    A bridge keeps the source of its adapter, and makes the adapters of its copies with it. So a source that is an
    object can be pickled, and is not changed.

    Attributes:
        sizes: Where the sizes come from that it is called with; for what it leaves out, `SIZES` and `FRAME_SIZES`.
    """

    @property
    def sizes(self) -> Sizes: ...  # noqa: D102 (an attribute)

    def __call__(self, cfg: TransformerBridgeConfig, /) -> "ArchitectureAdapter": ...  # noqa: D102


def name_of(source: AdapterSource) -> str:
    """Returns what a source is called in messages."""
    return source.__name__ if isinstance(source, type) else repr(source)


class ArchitectureAdapter:
    """Where each canonical part of a family lives, and how its tensors convert.

    A family is a class with `mapping`, and with those of the class attributes that differ. What follows from the
    mapping is not said again: conversions of weights, and fields of the sizes such as `gated_mlp` or `final_rms`.

    Attributes:
        cfg: The model's sizes, with the family's values set.
        component_mapping: Canonical names to component templates, in the order of the forward.
        weight_processing_conversions: Canonical weight names to conversions, with `{i}` for the layer where all layers
            have the same.

    Args:
        cfg: The model's sizes; the adapter sets the family's values on it.
    """

    sizes: ClassVar[Sizes] = SIZES
    """For fields of `TransformerBridgeConfig`, the entries of the model's config that its own code reads, of which the
    first that is set counts. Without one, a head is `d_model / n_heads` wide, an MLP `4 * d_model`, and keys and values
    have as many heads as queries."""
    config_values: Mapping[str, object] = MappingProxyType({})
    """Fields of `TransformerBridgeConfig` that the family fixes, and that do not follow from its parts."""
    default_cfg: ClassVar[dict[str, object]] = {}
    """Further fields: options of how the family is shown."""
    makes_positions_from_mask: bool = False
    """Whether the model itself numbers positions by the padding mask."""
    whole_sequences: str | None = None
    """Why a run cannot continue from the keys and values of earlier positions, or None if it can."""
    whole_forwards: str | None = None
    """Why neither some of the blocks nor attention can be run apart from the whole forward, or None if they can."""
    no_generation: str | None = None
    """Why points cannot be followed through a generation, or None if they can."""
    irrelevant: Mapping[str, str] = MappingProxyType(
        {"*inv_freq": "frequencies of the rotation, which the config fixes"}
    )
    """Parameters and buffers that no component accounts for, as patterns of their paths, each with the reason."""
    refused: Mapping[str, str] = MappingProxyType({})
    """Points that the parts would have and the model's bridge has not, each with the reason."""
    component_mapping: dict[str, GeneralizedComponent]
    weight_processing_conversions: dict[str, ParamProcessingConversion]

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        self.cfg = cfg
        said = {**self.config_values, **self.default_cfg}
        cfg.update({"eps_attr": self._eps_attr(cfg.eps_attr), **said})
        before = dict(vars(cfg))
        self.component_mapping = dict(self.mapping(cfg))
        said |= {field: value for field, value in vars(cfg).items() if value != before[field]}  # set by the mapping
        layers = layers_of(self.component_mapping, cfg.n_layers)
        self.weight_processing_conversions = weight_conversions(layers, cfg)
        cfg.update({**implied(self.component_mapping, layers, cfg), **said})

    def _eps_attr(self, found: str) -> str:
        names = self.sizes.get("eps", ())
        return found if not isinstance(names, tuple) or not names or found in names else names[0]

    def mapping(self, cfg: TransformerBridgeConfig) -> Mapping[str, GeneralizedComponent]:
        """Returns the parts by canonical name, in the order of the forward: what `parts.decoder` gives.

        Args:
            cfg: The model's sizes; `cfg.hf` has the Hugging Face config's own entries.
        """
        raise NotImplementedError

    @property
    def source(self) -> AdapterSource:
        """What makes this adapter for the same sizes."""
        return type(self)

    @property
    def uses_combined_qkv(self) -> bool:
        """Whether queries, keys and values come from one linear map, in all layers."""
        layers = layers_of(self.component_mapping, self.cfg.n_layers)
        return all(isinstance(layer.submodules.get("attn"), JointQKVAttentionBridge) for layer in layers)
