"""Which entries of its config a model's code reads."""

import pytest
from tests.unit.architectures.own_model import own_model
from tests.zoo import build

from clearspan.hf.config_reads import defaults, entries_read, stored_name


def test_entries_are_found_in_the_code_of_the_classes_that_are_there():
    read = entries_read(build("granite"))
    assert read["residual_multiplier"] is read["logits_scaling"] is True
    assert read["attention_bias"] is False  # it is read for the bias of a linear map alone
    assert "num_experts_per_tok" not in read
    assert "hidden_size" in entries_read(build("llama"))


def test_a_class_outside_of_transformers_is_read_too():
    read = entries_read(own_model())
    assert {"width", "heads", "depth"} <= set(read)
    assert read["heads"] is True
    assert read["vocabulary"] is False


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_names_are_those_that_the_config_keeps(variant):
    config = build(variant).config
    name = stored_name(config, "hidden_size")
    assert name == ("n_embd" if variant == "gpt2" else "hidden_size")
    assert name in defaults(config)
