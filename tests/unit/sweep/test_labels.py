"""Texts of positions are those of the real tokens, whatever side the padding is on."""

import pytest
import torch

import clearspan
from clearspan.interventions import Zero
from clearspan.sweep import LogitDifference, Sweep, grid
from clearspan.sweep.labels import position_texts


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot("tiny-bigcode")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_is_named_where_all_rows_that_have_it_agree(bridge, side):
    batch = bridge.to_batch(["import os", "import os as x", "import re"], padding_side=side)
    words = bridge.to_str_tokens("import os as x")
    ((axis, texts),) = position_texts(bridge, batch, {"position": range(6), "layer": [0]}).items()
    assert axis == "position"
    assert texts == (
        f"0 {words[0]}",
        "1 import",
        "2",
        f"3 {words[3]}".replace("  ", " ·"),
        f"4 {words[4]}".replace("  ", " ·"),
        "5",
    )


def test_negative_and_several_positions(bridge):
    batch = bridge.to_batch("import os")
    found = position_texts(bridge, batch, {"key_position": [-1, (1, 2), "all"]})
    assert found == {"key_position": ("-1 ·os", "1, 2 import·os", "all")}
    batch = bridge.to_batch(["import os", "import"])
    assert position_texts(bridge, batch, {"position": [-1, -3]})["position"] == ("-1", "-3 <|endoftext|>")


def test_a_sweep_labels_its_positions_and_a_row_that_lacks_one_is_left_out(bridge):
    texts = ["import os", "import os as x"]
    cells = grid("resid_pre", Zero(), layer=[1], position=range(5))
    found = Sweep(bridge, texts, cells, LogitDifference(1, 2)).run(progress=False)
    assert found.labels["position"][1] == "1 import"
    assert found.of()[0, 3:].isnan().tolist() == [[True, False]] * 2
    alone = Sweep(bridge, texts[1], cells, LogitDifference(1, 2)).run(progress=False)
    torch.testing.assert_close(found.mean()[0, 3:], alone.mean()[0, 3:], rtol=1e-4, atol=1e-4)
    assert "position text" in found.to_dataframe()
    assert found.units == {"logit_difference": "logits"}


def test_without_a_tokenizer_tokens_are_labelled_by_their_ids(bridge):
    model = clearspan.boot(bridge.hf_model)
    batch = model.to_batch(torch.tensor([[1, 2, 3]]))
    assert position_texts(model, batch, {"position": range(3)}) == {"position": ("0 #1", "1 #2", "2 #3")}
    assert position_texts(bridge, bridge.to_batch(torch.zeros(1, 3, bridge.cfg.d_model)), {"position": [0]}) == {}
