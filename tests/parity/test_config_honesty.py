"""What a config says, a model's code reads and an adapter does not speak of: verify names it."""

import pytest
import torch
import transformers
from tests.unit.architectures.own_model import OwnArchitectureAdapter, own_model
from tests.zoo import GROUPED, IDS, MODELS, build

import clearspan
from clearspan.architectures.llama import LlamaArchitectureAdapter
from clearspan.verification.config_entries import EXPLAINED, unexplained


@pytest.mark.parametrize("variant", MODELS)
def test_nothing_of_the_zoo_is_unexplained(variant):
    assert not list(unexplained(clearspan.boot(build(variant))))


class Boosted(transformers.LlamaForCausalLM):
    """Code of one's own on top of Llama's, which scales logits by an entry that Llama does not have."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * getattr(self.config, "logit_boost", 1.0)
        return output


def boosted(**entries):
    torch.manual_seed(0)
    model = Boosted(transformers.LlamaConfig(**IDS, **GROUPED, **entries)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return clearspan.boot(model, adapter=LlamaArchitectureAdapter)


def test_an_entry_that_changes_the_forward_and_is_in_no_part_is_named():
    found = boosted(logit_boost=2.5).verify()
    line = (
        "config.logit_boost is 2.5, which the model's code reads, and nothing of the adapter speaks of it: what it "
        "does may be in no point"
    )
    assert found.unexplained == (line,)
    assert f"  warning: {line}" in str(found).splitlines()


def test_an_entry_that_no_code_reads_is_not_named():
    assert not list(unexplained(boosted(boost_of_logits=2.5)))


def test_entries_of_another_familys_adapter_are_named():
    bridge = clearspan.boot(build("granite"), adapter=LlamaArchitectureAdapter)
    named = [what.split()[0] for what in unexplained(bridge)]
    assert named == ["config.embedding_multiplier", "config.logits_scaling", "config.residual_multiplier"]


def test_a_value_that_is_in_a_part_is_explained():
    class Measured(LlamaArchitectureAdapter):
        def mapping(self, cfg):
            mapping = super().mapping(cfg)
            mapping["blocks"].residual_multiplier, mapping["embed"].multiplier = 0.3, 3.0
            mapping["unembed"].scale = 0.5  # of 1 / 2.0
            return mapping

    assert not list(unexplained(clearspan.boot(build("granite"), adapter=Measured)))


def test_sizes_that_are_read_under_other_names_are_explained():
    assert not list(unexplained(clearspan.boot(own_model(width=32), adapter=OwnArchitectureAdapter)))


def test_every_explained_entry_has_a_reason():
    assert all(reason for reason in EXPLAINED.values())
