"""Parts that no component describes are named, with the reason, where a structure is derived."""

import warnings

import pytest
import torch
from torch import nn
from transformers import HeliumConfig, HeliumForCausalLM
from typer.testing import CliRunner

import clearspan
from clearspan.cli import app
from clearspan.components import OpaqueBridge, PerLayer, StreamBlockBridge
from clearspan.components.block import BlockBridge
from clearspan.errors import DerivedWarning
from clearspan.structure import Finding, derive, source
from clearspan.structure.unshown import unshown

REASON = (
    "only the ends of model.layers.N.mlp are known: model.layers.N.mlp.second reads neither the input of "
    "model.layers.N.mlp nor a norm of it"
)


class Deep(nn.Module):
    """An MLP of three maps, one after the other."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(hidden)))))


@pytest.fixture(scope="module")
def model():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    config = HeliumConfig(vocab_size=97, hidden_size=48, num_hidden_layers=4, intermediate_size=80, **heads)
    torch.manual_seed(0)
    found = HeliumForCausalLM(config)
    for layer in (0, 1, 3):
        found.model.layers[layer].mlp = Deep(48)
    return found.eval()


def test_boot_names_the_parts_whose_inside_is_not_shown(model, monkeypatch):
    monkeypatch.setattr("clearspan.bridge._SAID", set())  # other tests may have booted this class
    with pytest.warns(DerivedWarning) as said:
        bridge = clearspan.boot(model)
    assert said[0].filename == __file__
    assert str(said[0].message).endswith(
        f"bridge.verify() checks the rest. Not shown: the inside of mlp in layers 0, 1, 3: {REASON}"
    )
    assert "blocks.0.mlp.hook_pre" not in bridge.hook_dict
    assert "blocks.2.mlp.hook_pre" in bridge.hook_dict
    assert torch.allclose(bridge.blocks[2].mlp.W_in, model.model.layers[2].mlp.up_proj.weight.T)


def test_an_adapter_that_is_written_says_it_in_a_comment(model):
    lines = source(derive(model), model).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("        # mlp: "))
    said = [line.removeprefix("        # ") for line in lines[first:] if line.startswith("        # ")]
    assert " ".join(said) == f"mlp: {REASON}"


def test_the_command_says_it(model, tmp_path, monkeypatch):
    with warnings.catch_warnings(action="ignore", category=DerivedWarning):
        bridge = clearspan.boot(model)
    monkeypatch.setattr("clearspan.boot", lambda one, **given: bridge)  # no checkpoint loads such MLPs
    result = CliRunner().invoke(app, ["adapt", str(tmp_path)])
    assert f"not shown: the inside of mlp in layers 0, 1, 3: {REASON}" in result.stderr.splitlines()


def test_layers_with_a_reason_are_said_together():
    blocks = [BlockBridge("layers", submodules={"mlp": OpaqueBridge("mlp")}) for _ in range(6)]
    blocks[2] = BlockBridge("layers")
    blocks[3] = StreamBlockBridge("layers", "layers.3 is odd")
    findings = [Finding("blocks.5.mlp", "layers.5.mlp is odd"), Finding("blocks.4.mlp", "layers.4.mlp is odd")]
    assert list(map(str, unshown({"blocks": PerLayer(blocks)}, findings))) == [
        "the inside of mlp in layers 0, 1: no component describes it",
        "the inside of the block in layer 3: layers.N is odd",
        "the inside of mlp in layers 4, 5: layers.N.mlp is odd",
    ]
