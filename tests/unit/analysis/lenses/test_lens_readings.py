import pytest
import torch
from clearspan.analysis.lenses.lens_readings import lens_readings
from clearspan.analysis.lenses.streams import stream_names
from tests.zoo import build

import clearspan
from clearspan.errors import InvalidArgumentError

TEXTS = ["import os\nimport sys", "def f(self"]


def naive(bridge, tokens, depth, lens=lambda resid: resid):
    """Log-probabilities at a depth, by writing its stream over the one that leaves the last block."""
    _, cache = bridge.run_with_cache(tokens)
    stream = cache[stream_names(bridge.cfg.n_layers)[depth]]
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
        tokens, mask = bridge.text.encode(TEXTS, padding_side=side)
        by_side = lens_readings(bridge, tokens, attention_mask=mask)
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
    ("arguments", "lines"),
    [
        ({"positions": 9}, ["row 0 has no position 9", "  expected: -6 to 5", "  got: 9"]),
        ({"positions": []}, ["there is no position to read", "  expected: positions=None for all", "  got: none"]),
        ({"depths": [6]}, ["there is no depth 6", "  expected: 0 (the embedding) to 5, or -6 to -1", "  got: 6"]),
        ({"depths": []}, ["there is no depth to read", "  expected: depths=None for all", "  got: none"]),
        ({"top_k": 0}, ["top_k=0 tokens cannot be kept", "  expected: 1 to 4096"]),
        (
            {"targets": torch.tensor([4096, 1])},
            ["targets are one token for each row", "  expected: 2 tokens, ids from 0 to 4095", "  got: 2: [4096, 1]"],
        ),
        (
            {"targets": [","]},
            ["targets are one token for each row", "  expected: 2 tokens, ids from 0 to 4095", "  got: 1: [12]"],
        ),
    ],
)
def test_what_is_not_there_raises(bridge, arguments, lines):
    with pytest.raises(InvalidArgumentError) as raised:
        lens_readings(bridge, TEXTS, **arguments)
    assert str(raised.value).splitlines() == lines
