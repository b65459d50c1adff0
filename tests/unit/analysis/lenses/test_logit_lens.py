import pytest
import torch
from clearspan.analysis.lenses.lens import LogitLens, logit_lens
from tests.conftest import tiny_model

import clearspan
from clearspan.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def lens(bridge, tokens):
    return logit_lens(bridge, tokens)


@torch.no_grad()
def test_the_last_row_is_the_models_own_prediction_exactly(bridge, tokens, lens):
    own = bridge(tokens)[0].softmax(-1).max(-1)
    assert torch.equal(lens.top_ids[-1], own.indices)
    assert torch.equal(lens.top_probs[-1], own.values)
    assert torch.equal(lens.final_ids, own.indices)
    assert torch.equal(lens.final_probs[-1], own.values)
    assert not lens.final_ranks[-1].any()


@torch.no_grad()
def test_every_row_is_norm_then_unembedding_of_its_stream(bridge, tokens, lens):
    _, cache = bridge.run_with_cache(tokens)
    streams = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(bridge.cfg.n_layers))]
    assert lens.depths == ("embed", "0", "1", "2", "3", "4")
    for row, stream in enumerate(streams):
        probs = bridge.unembed(bridge.ln_final(stream))[0].softmax(-1)
        torch.testing.assert_close(lens.top_probs[row], probs.max(-1).values, rtol=1e-5, atol=1e-7)
        final = probs[range(tokens.shape[1]), lens.final_ids]
        torch.testing.assert_close(lens.final_probs[row], final, rtol=1e-5, atol=1e-7)
        assert torch.equal(lens.final_ranks[row], (probs > final[:, None]).sum(-1))


def test_text_is_read_as_its_tokens(bridge, tokens, lens):
    of_text = logit_lens(bridge, bridge.to_string(tokens[0, 1:]))
    assert of_text.tokens == lens.tokens == tuple(tokens[0].tolist())
    assert torch.equal(of_text.top_ids, lens.top_ids)


@torch.no_grad()
def test_streams_go_through_the_lens_first(bridge, tokens, lens):
    """A lens that puts the last stream in the place of each: every depth then predicts what the model does."""
    last = bridge(tokens, stop_at_layer=bridge.cfg.n_layers)
    depths = []

    def from_the_end(resid, depth):
        depths.append(depth)
        return last if depth else resid

    through = logit_lens(bridge, tokens, lens=from_the_end)
    assert depths == [0, 1, 2, 3, 4, 5]
    assert torch.equal(through.top_ids[0], lens.top_ids[0])
    for row in range(1, 6):
        assert torch.equal(through.top_ids[row], lens.final_ids)


def test_the_table_has_a_row_for_each_position_and_depth(bridge, tokens, lens):
    frame = lens.to_dataframe()
    assert len(frame) == tokens.shape[1] * 6
    row = frame[(frame.position == 3) & (frame.depth == "2")].iloc[0]
    assert row.id == lens.top_ids[3, 3]
    assert row.predicts == bridge.to_single_str_token(int(row.id)).replace(" ", "·").replace("\n", "⏎")
    assert row.probability == pytest.approx(float(lens.top_probs[3, 3]))
    assert row["final rank"] == lens.final_ranks[3, 3]


def test_it_prints_the_last_positions_and_plots_positions_by_depth(tokens, lens):
    printed = str(lens).splitlines()
    assert printed[1].split()[:3] == ["position", "depth", "id"]
    assert [line.split()[:2] for line in printed[2:5]] == [[str(tokens.shape[1] - 1), d] for d in ("embed", "0", "1")]
    heat = lens.plot().data[0]
    assert list(heat.x) == list(lens.depths)
    assert heat.y[0] == "0 &lt;|endoftext|&gt;"
    assert len(heat.z) == len(heat.text) == tokens.shape[1]


def test_without_a_tokenizer_tokens_are_shown_as_ids():
    lens = logit_lens(clearspan.boot(tiny_model()), torch.tensor([[5, 6, 7]]))
    assert lens.columns()["predicts"] == [str(i) for i in lens.columns()["id"]]
    assert list(lens.plot().data[0].y) == ["0 5", "1 6", "2 7"]


def test_a_lens_without_the_texts_own_tokens_plots_positions():
    ids = torch.tensor([[1, 2], [1, 3]])
    bare = LogitLens(ids, torch.rand(2, 2), ids[-1], torch.rand(2, 2), torch.zeros(2, 2, dtype=torch.long))
    assert list(bare.plot().data[0].y) == ["0 ∅", "1 ∅"]


def test_several_rows_and_things_that_are_no_lens_raise(bridge, tokens):
    with pytest.raises(InvalidArgumentError) as raised:
        logit_lens(bridge, tokens.repeat(2, 1))
    assert str(raised.value).splitlines() == [
        "a logit lens shows one text",
        "  expected: token ids [1, pos]",
        "  got: [2, 12]",
        "  fix: lens_readings(bridge, tokens)",
    ]
    with pytest.raises(InvalidArgumentError, match="cannot read through this lens") as raised:
        logit_lens(bridge, tokens, lens=torch.eye(3))
    assert "got: Tensor" in str(raised.value)
