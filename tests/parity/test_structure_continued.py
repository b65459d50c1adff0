"""A model whose forward gives no KV cache says so when it is derived, and runs whole sequences."""

from clearspan import zoo
from clearspan.structure import adapter_of, derive, source


def test_a_model_without_a_kv_cache_runs_whole_sequences():
    model = zoo.build("openai-gpt")
    structure = derive(model)
    assert structure.whole_sequences == "its forward gives no KV cache"
    assert adapter_of(source(structure, model)).whole_sequences == "its forward gives no KV cache"


def test_a_model_with_one_does_not():
    assert derive(zoo.build("helium")).whole_sequences is None
    assert derive(zoo.build("mamba")).whole_sequences is None  # what its mixers keep is said by the bridge
