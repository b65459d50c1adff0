"""From a Hugging Face config to the bridge's."""

from typing import TYPE_CHECKING, Any

from clearspan.architectures import ArchitectureAdapter
from clearspan.config import TransformerBridgeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def bridge_config(model: "PreTrainedModel", adapter: type[ArchitectureAdapter]) -> TransformerBridgeConfig:
    """Returns the sizes of a model.

    Args:
        model: The Hugging Face model.
        adapter: Its adapter's class, which names the config's own word for the norms' epsilon.
    """
    config: PretrainedConfig = model.config
    return TransformerBridgeConfig(
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_layers=config.num_hidden_layers,
        n_ctx=_first(config, "max_position_embeddings", "max_seq_len", "seq_length") or UNLIMITED,
        d_vocab=config.vocab_size,
        d_head=_first(config, "head_dim") or 0,
        d_mlp=_first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 0,
        act_fn=_first(config, "hidden_act", "activation_function", "hidden_activation", "activation") or "",
        eps=_first(config, str(adapter.config_values["eps_attr"])) or 1e-5,
        n_key_value_heads=_first(config, "num_key_value_heads"),
        architecture=type(model).__name__,
        model_name=config.name_or_path or "",
        dtype=model.dtype,
        hf=_entries(config),
    )


UNLIMITED = 2048
"""Context of a model whose config sets no limit."""


def _entries(config: "PretrainedConfig") -> dict[str, Any]:
    """Returns the config's entries, under their own names and under the common ones."""
    own = config.to_dict()
    return {**own, **{common: own[name] for common, name in config.attribute_map.items() if name in own}}


def _first(config: "PretrainedConfig", *names: str) -> Any:
    """Returns the first of several entries that the config has, under its own or a common name."""
    for name in names:
        stored = config.attribute_map.get(name, name)
        value = vars(config).get(stored)
        if value is not None:
            return value
    return None


def revision_of(model: "PreTrainedModel") -> str | None:
    """Returns the commit of a model's files on the hub, or None where they came from elsewhere."""
    return vars(model.config).get("_commit_hash")
