"""What an adapter sets by hand is honoured, or refused."""

import json

import pytest
from tests.zoo import build

import clearspan
from clearspan.architectures import ADAPTERS
from clearspan.errors import AdapterError, CheckpointError

Llama = ADAPTERS["LlamaForCausalLM"]


class Capped(Llama):
    """An adapter whose mapping sets what parts imply otherwise."""

    def mapping(self, cfg):
        cfg.output_logits_soft_cap = 7.0
        cfg.logit_scale = 0.5
        return super().mapping(cfg)


class Late(Llama):
    """An adapter that changes a block which is made."""

    def mapping(self, cfg):
        parts = super().mapping(cfg)
        parts["blocks"].is_parallel = True
        return parts


def test_sizes_that_a_mapping_sets_stay():
    cfg = clearspan.boot(build("llama"), adapter=Capped).cfg
    assert (cfg.output_logits_soft_cap, cfg.logit_scale) == (7.0, 0.5)


def test_a_block_that_is_made_parallel_afterwards_is_refused():
    with pytest.raises(AdapterError) as error:
        clearspan.boot(build("llama"), adapter=Late)
    assert str(error.value).splitlines() == [
        "is_parallel=True was set on a block with the stages (('attn',), ('mlp',))",
        "  where: blocks.0",
        "  reason: stages say which sublayers read the same stream, and follow from is_parallel only at first",
        '  fix: BlockBridge(is_parallel=True, ...), or stages=(("attn", "mlp"),)',
    ]


@pytest.mark.parametrize("lacking", ["OwnForCausalLM", "OwnConfig"])
def test_code_of_a_checkpoint_that_lacks_a_class(lacking, tmp_path):
    clearspan.zoo.build("helium").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    named = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": named, "model_type": "own"}))
    config = "from transformers import HeliumConfig\n\n\nclass OwnConfig(HeliumConfig):\n    model_type = 'own'\n"
    (tmp_path / "own.py").write_text(config if lacking == "OwnForCausalLM" else "OwnForCausalLM = None\n")
    with pytest.raises(CheckpointError) as error:
        clearspan.boot(str(tmp_path), trust_remote_code=True)
    what, *facts = str(error.value).splitlines()
    assert what == f"the code of {str(tmp_path)!r} lacks a class"
    assert facts[0] == "  expected: the classes that auto_map in its config.json names, in its files of code"
    assert facts[1].endswith(f"has no attribute {lacking!r}")
