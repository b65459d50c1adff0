"""Names of TransformerLens's config."""

import copy
import pickle

import pytest
import torch
from tests.zoo import build

import clearspan


def test_sizes_and_places(bridge, embedded):
    cfg = bridge.cfg
    assert cfg.device == "cpu"
    assert cfg.d_vocab_out == cfg.d_vocab == 97
    assert cfg.head_dim == cfg.d_head == 12
    assert cfg.bos_token_id == cfg.eos_token_id == bridge.hf_model.config.eos_token_id
    assert cfg.tie_word_embeddings is True
    assert cfg.initializer_range == bridge.hf_model.config.initializer_range
    assert cfg.num_experts is cfg.experts_per_token is cfg.decoder_start_token_id is None
    assert cfg.tokenizer_name is None
    assert embedded.cfg.tokenizer_name == embedded.tokenizer.name_or_path
    values = cfg.to_dict()
    assert values["d_model"] == 48
    values["d_model"] = 0
    assert cfg.d_model == 48


def test_weights_are_counted_in_the_blocks():
    bridge = clearspan.boot(build("llama biases"))
    block = bridge.hf_model.model.layers[0]
    weights = [one.numel() for one in block.parameters() if one.ndim == 2]
    assert bridge.cfg.n_params == 3 * sum(weights)
    mixture = clearspan.boot(build("mixtral")).cfg
    assert (mixture.num_experts, mixture.experts_per_token) == (4, 2)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "llama", "qwen3", "gemma3", "granite", "gptj", "falcon"])
def test_scores_are_divided_by_the_scale(name):
    torch.manual_seed(0)
    bridge = clearspan.boot(build(name))
    tokens = torch.randint(1, 90, (1, 5))
    _, cache = bridge.run_with_cache(tokens)
    rotated = "rot_" if "blocks.0.attn.hook_rot_q" in bridge.hook_dict else ""
    queries, keys = cache[f"blocks.0.attn.hook_{rotated}q"], cache[f"blocks.0.attn.hook_{rotated}k"]
    products = torch.einsum("bqhd,bkhd->bhqk", queries, bridge.expand_kv_heads(keys, -2))
    last = cache["attn_scores", 0][:, :, -1]
    seen = last > -1e4  # a sliding window hides the others
    assert torch.allclose((products[:, :, -1] / bridge.cfg.attn_scale)[seen], last[seen], atol=1e-4)


def test_a_config_is_copied_and_pickled(bridge):
    assert copy.deepcopy(bridge.cfg) == bridge.cfg == pickle.loads(pickle.dumps(bridge.cfg))
