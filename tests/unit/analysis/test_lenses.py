import pytest
import torch
from tests.conftest import tiny_model
from tests.zoo import build

import clearspan
from clearspan.analysis import LogitLens, lens_readings, logit_lens
from clearspan.errors import InvalidArgumentError

TEXTS = ["import os\nimport sys", "def f(self"]


def naive(bridge, tokens, depth, lens=lambda resid: resid):
    """Log-probabilities at a depth, by writing its stream over the one that leaves the last block."""
    _, cache = bridge.run_with_cache(tokens)
    stream = cache["resid_post", depth - 1] if depth else cache["resid_pre", 0]
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    return bridge.run_with_hooks(tokens, fwd_hooks=[(last, lambda resid, hook: lens(stream))]).log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2", "opt post-norm", "mixtral", "granite"])
def test_every_number_is_that_of_a_run_with_the_stream_written_last(variant):
    bridge = clearspan.boot(build(variant))
    tokens = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(2))
    found = lens_readings(bridge, tokens, positions=[1, -1], targets=torch.tensor([7, 9]), top_k=3)
    assert found.places == ((0, 1), (0, 5), (1, 1), (1, 5))
    rows, columns = torch.tensor(found.places).T
    final = bridge(tokens).log_softmax(-1)[rows, columns]
    for depth in range(bridge.cfg.n_layers + 1):
        expected = naive(bridge, tokens, depth)[rows, columns]
        target = expected[range(4), [7, 7, 9, 9]]
        top = expected.topk(3)
        own = torch.distributions.Categorical(logits=final)
        read = torch.distributions.Categorical(logits=expected)
        assert torch.equal(found.top_ids[depth], top.indices)
        assert torch.equal(found.target_ranks[depth], (expected > target[:, None]).sum(-1))
        torch.testing.assert_close(found.top_log_probs[depth], top.values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.target_log_probs[depth], target, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.entropy[depth], read.entropy(), rtol=1e-4, atol=1e-4)
        kl = torch.distributions.kl_divergence(own, read)
        torch.testing.assert_close(found.kl[depth], kl, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padded_texts_read_as_each_alone(bridge):
    both = lens_readings(bridge, TEXTS, positions=None)
    alone = [lens_readings(bridge, text, positions=None) for text in TEXTS]
    lengths = [bridge.to_tokens(text).shape[1] for text in TEXTS]
    assert lengths[0] != lengths[1]
    assert both.places == tuple((row, position) for row in (0, 1) for position in range(lengths[row]))
    for name in ("target_log_probs", "kl", "entropy"):
        expected = torch.cat([getattr(one, name) for one in alone], dim=1)
        torch.testing.assert_close(getattr(both, name), expected, rtol=1e-4, atol=1e-4)
    for side in ("left", "right"):
        batch = bridge.to_batch(TEXTS, padding_side=side)
        by_side = lens_readings(bridge, batch.tokens, attention_mask=batch.mask)
        assert by_side.places == ((0, lengths[0] - 1), (1, lengths[1] - 1))
        torch.testing.assert_close(by_side.kl, both.kl[:, [lengths[0] - 1, -1]], rtol=1e-4, atol=1e-4)


def test_targets_are_the_models_own_unless_given(bridge):
    own = lens_readings(bridge, TEXTS)
    assert own.target_ids.tolist() == [int(bridge(text)[0, -1].argmax()) for text in TEXTS]
    assert own.target_ranks[-1].tolist() == [0, 0]
    given = lens_readings(bridge, TEXTS, targets=["\n", ","])
    assert given.target_ids.tolist() == [bridge.to_single_token("\n"), bridge.to_single_token(",")]
    assert given.columns()["target"] == ["⏎"] * 6 + [","] * 6


def test_depths_can_be_chosen(bridge):
    every = lens_readings(bridge, TEXTS)
    some = lens_readings(bridge, TEXTS, depths=[0, 3, -1])
    assert some.depths == ("embed", "2", "4")
    assert torch.equal(some.target_log_probs, every.target_log_probs[[0, 3, 5]])


@torch.no_grad()
def test_streams_go_through_the_lens_first(bridge):
    tokens = bridge.to_tokens("def f(self")
    found = lens_readings(bridge, tokens, lens=lambda resid, depth: resid.roll(depth, -1), depths=[2])
    expected = naive(bridge, tokens, 2, lambda resid: resid.roll(2, -1))[0, -1]
    torch.testing.assert_close(found.top_log_probs[0, 0], expected.topk(5).values, rtol=1e-4, atol=1e-4)


def test_the_table_and_the_plot(bridge):
    found = lens_readings(bridge, TEXTS)
    frame = found.to_dataframe()
    assert list(frame.columns) == [*"row position depth predicts target".split(), "log prob", "rank", "KL", "entropy"]
    row = frame[(frame.row == 1) & (frame.depth == "0")].iloc[0]
    assert row["log prob"] == pytest.approx(float(found.target_log_probs[1, 1]))
    assert (row["rank"], row.KL) == (int(found.target_ranks[1, 1]), pytest.approx(float(found.kl[1, 1])))
    surprisal, kl, entropy = found.plot().data
    assert list(kl.y) == pytest.approx(found.kl.mean(1).tolist())
    assert list(surprisal.y) == pytest.approx((-found.target_log_probs).mean(1).tolist())
    assert entropy.name == "entropy"
    assert str(found).startswith("lens readings: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": 9}, "row 0 has no position 9\n  expected: -6 to 5\n  got: 6 real tokens"),
        ({"positions": []}, "row 0 has no position in []\n  expected: positions=None for all\n  got: 6 real tokens"),
        ({"depths": [6]}, "there is no depth 6\n  expected: 0 (the embedding) to 5, or -6 to -1\n  got: 6"),
        ({"depths": []}, "there is no depth to read\n  expected: depths=None for all\n  got: none"),
        ({"top_k": 0}, "top_k=0\n  expected: a whole number, top_k >= 1"),
        ({"top_k": 4097}, "top_k=4097 tokens cannot be kept\n  expected: 1 to 4096"),
        (
            {"targets": torch.tensor([4096, 1])},
            "targets are one token for each row\n  expected: 2 tokens, ids from 0 to 4095\n  got: 2: [4096, 1]",
        ),
        (
            {"targets": [","] * 3},
            "targets are one token for each row\n  expected: 2 tokens, ids from 0 to 4095\n  got: 3: [12, 12, 12]",
        ),
    ],
)
def test_what_is_not_there_raises(bridge, arguments, message):
    with pytest.raises(InvalidArgumentError) as raised:
        lens_readings(bridge, TEXTS, **arguments)
    assert str(raised.value) == message


# --- the logit lens of one text -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lens(bridge, tokens):
    return logit_lens(bridge, tokens)


@torch.no_grad()
def test_the_last_row_is_the_models_own_prediction(bridge, tokens, lens):
    own = bridge(tokens)[0].softmax(-1).max(-1)
    assert torch.equal(lens.top_ids[-1], own.indices)
    torch.testing.assert_close(lens.top_probs[-1], own.values)
    assert torch.equal(lens.final_ids, own.indices)
    assert torch.equal(lens.final_probs[-1], lens.top_probs[-1])
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
def test_a_logit_lens_goes_through_the_lens_first(bridge, tokens, lens):
    """A lens that puts the last stream in the place of each: every depth then predicts what the model does."""
    last = bridge(tokens, stop_at_layer=bridge.cfg.n_layers)[0]
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
    assert lens.columns()["predicts"] == [f"#{i}" for i in lens.columns()["id"]]
    assert list(lens.plot().data[0].y) == ["0 #5", "1 #6", "2 #7"]


def test_a_lens_without_the_texts_own_tokens_plots_positions():
    ids = torch.tensor([[1, 2], [1, 3]])
    bare = LogitLens(ids, torch.rand(2, 2), ids[-1], torch.rand(2, 2), torch.zeros(2, 2, dtype=torch.long))
    assert list(bare.plot().data[0].y) == ["0 ∅", "1 ∅"]


def test_several_rows_and_things_that_are_no_lens_raise(bridge, tokens):
    with pytest.raises(InvalidArgumentError) as raised:
        logit_lens(bridge, tokens.repeat(2, 1))
    assert str(raised.value).splitlines() == [
        "a logit lens shows one text",
        "  expected: an input of one row",
        "  got: 2 rows",
        "  fix: lens_readings(bridge, input)",
    ]
    with pytest.raises(InvalidArgumentError, match="cannot read through this lens") as raised:
        logit_lens(bridge, tokens, lens=torch.eye(3))
    assert "got: Tensor" in str(raised.value)
