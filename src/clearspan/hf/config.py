"""From a Hugging Face config to the bridge's."""

from typing import TYPE_CHECKING

from clearspan.architectures import ArchitectureAdapter
from clearspan.config import TransformerBridgeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def bridge_config(model: "PreTrainedModel", adapter: type[ArchitectureAdapter]) -> TransformerBridgeConfig:
    """Returns the sizes of a model.

    Args:
        model: The Hugging Face model.
        adapter: Its adapter's class, which names the config's own words for a few of them.
    """
    config: PretrainedConfig = model.config
    return TransformerBridgeConfig(
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        d_head=config.to_dict().get("head_dim") or 0,
        d_mlp=config.to_dict().get("intermediate_size") or config.to_dict().get("n_inner") or 0,
        act_fn=config.to_dict().get("hidden_act") or config.to_dict().get("activation_function") or "",
        eps=config.to_dict()[str(adapter.config_values["eps_attr"])],
        n_key_value_heads=config.to_dict().get("num_key_value_heads"),
        architecture=type(model).__name__,
        model_name=config.name_or_path or "",
        dtype=model.dtype,
    )
