"""What parts imply where some are missing: nothing of theirs."""

from clearspan.architectures import implied
from clearspan.architectures.implied import layers_of
from clearspan.components import EmbeddingBridge
from clearspan.config import TransformerBridgeConfig


def test_parts_that_are_missing_imply_nothing_of_theirs():
    frame = {"embed": EmbeddingBridge("wte")}
    assert layers_of(frame, 2) == []
    found = implied(frame, [], TransformerBridgeConfig(d_model=8, n_heads=2, n_layers=2, n_ctx=8, d_vocab=9))
    assert found["positional_embedding_type"] == "none"
    assert not {"logit_scale", "output_logits_soft_cap", "n_key_value_heads", "d_head"} & set(found)
    assert not found["attn_only"]
