import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import (
    Head,
    HeadScores,
    detect_heads,
    duplicate_token_pattern,
    head_scores,
    induction_pattern,
    previous_token_pattern,
    strongest,
)
from clearspan.errors import InvalidArgumentError

TEXTS = ["def f(self):\n    return self.x", "import os, sys, os"]


def naive(tokens, kind):
    """The patterns by their definitions, position by position."""
    tokens = tokens.tolist()
    expected = torch.zeros(len(tokens), len(tokens))
    for q in range(len(tokens)):
        for k in range(q + 1):
            expected[q, k] = {
                "previous_token": k == q - 1,
                "duplicate_token": k < q and tokens[k] == tokens[q],
                "induction": k > 0 and tokens[k - 1] == tokens[q],
            }[kind]
    return expected


@pytest.mark.parametrize("kind", ["previous_token", "duplicate_token", "induction"])
def test_patterns_are_their_definitions(kind):
    of = {
        "previous_token": previous_token_pattern,
        "duplicate_token": duplicate_token_pattern,
        "induction": induction_pattern,
    }[kind]
    for seed in range(5):
        tokens = torch.randint(4, (9,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(of(tokens), naive(tokens, kind))
    assert of(torch.tensor([3])).tolist() == [[0.0]]


@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "gemma2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_scores_are_their_definitions_on_padded_rows(variant, measure):
    bridge = clearspan.boot(build(variant))
    tokens = torch.randint(1, 4, (3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, 6:] = 0
    found = detect_heads(
        bridge,
        tokens,
        "induction",
        exclude_bos=True,
        exclude_current_token=True,
        error_measure=measure,
        attention_mask=mask,
    )
    expected = torch.zeros(3, bridge.cfg.n_layers, bridge.cfg.n_heads)
    for row in range(3):
        alone = tokens[row, mask[row].bool()]
        _, cache = bridge.run_with_cache(alone[None], names_filter=lambda name: name.endswith("hook_pattern"))
        for layer in range(bridge.cfg.n_layers):
            seen, wanted = cache["pattern", layer][0].clone(), naive(alone, "induction")
            for q in range(len(alone)):
                seen[:, q, 0] = wanted[q, 0] = seen[:, q, q] = wanted[q, q] = 0
            if measure == "mul":
                expected[row, layer] = (seen * wanted).sum((1, 2)) / seen.sum((1, 2))
            else:
                expected[row, layer] = 1 - (seen - wanted).abs().sum((1, 2)) / len(alone)
    # Rows run padded and alone: attention agrees up to float32 rounding.
    torch.testing.assert_close(found.scores, expected.mean(0), rtol=1e-4, atol=1e-5)
    assert found.of().shape == (bridge.cfg.n_layers, bridge.cfg.n_heads, 3)


def test_planted_heads_score_one(embedded):
    tokens = embedded.to_tokens(TEXTS[0])
    ideal = previous_token_pattern(tokens[0])
    ideal[0, 0] = 1

    def plant(attention, hook):
        attention[:, 5] = ideal

    with embedded.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", plant)]):
        plain = detect_heads(embedded, tokens, "previous_token")
        share = detect_heads(embedded, tokens, "previous_token", exclude_current_token=True)
        distance = detect_heads(embedded, tokens, ideal, error_measure="abs")
    length = tokens.shape[1]
    assert plain.scores[1, 5].item() == pytest.approx((length - 1) / length)
    assert share.scores[1, 5] == distance.scores[1, 5] == 1
    assert (share.strongest(1)[0].layer, share.strongest(1)[0].head) == (1, 5)


def test_the_known_induction_head_is_found(embedded):
    found = detect_heads(embedded, "import tempfile, socketserver\nimport tempfile, socketserver", "induction")
    assert found.strongest(3)[0].layer == 4
    assert [head.score for head in found.strongest(40)] == sorted(found.scores.flatten().tolist(), reverse=True)


def test_texts_are_the_mean_of_each_alone_and_a_function_is_a_pattern(embedded):
    both = detect_heads(embedded, TEXTS, naive_previous := lambda tokens: naive(tokens, "previous_token"))
    alone = [detect_heads(embedded, text, "previous_token").scores for text in TEXTS]
    torch.testing.assert_close(both.scores, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)
    assert both.pattern == "custom"
    matrix = detect_heads(embedded, TEXTS[0], naive_previous(embedded.to_tokens(TEXTS[0])[0]))
    assert torch.equal(matrix.scores, alone[0])


@pytest.mark.parametrize("heads", [[(3, 1), (0, 7)], {3: [1], 0: [7]}])
def test_only_the_heads_asked_for_have_scores(embedded, heads):
    every = detect_heads(embedded, TEXTS[0], "previous_token")
    some = detect_heads(embedded, TEXTS[0], "previous_token", heads=heads)
    assert some.scores.isnan().sum() == 38
    for layer, head in [(3, 1), (0, 7)]:
        # Layers in between run their own kernel, where nobody listens, instead of the eager one.
        torch.testing.assert_close(some.scores[layer, head], every.scores[layer, head], rtol=1e-5, atol=1e-6)
    assert len(some.strongest(9)) == len(some.to_dataframe()) == 2


def test_layers_after_the_last_asked_for_are_not_run(embedded):
    seen = []
    with embedded.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: seen.append(hook.name))]):
        detect_heads(embedded, TEXTS[0], "previous_token", heads=[(1, 0)])
    assert seen == ["blocks.1.hook_resid_pre"]


def test_it_prints_and_plots(embedded):
    found = detect_heads(embedded, TEXTS[0], "duplicate_token")
    assert str(found).startswith("duplicate token heads: share of attention on the pattern, mean over 1 row\nlayer")
    assert found.plot().data[0].z[2][3] == pytest.approx(found.scores[2, 3].item(), abs=5e-5)
    assert "1 - |attention - pattern|" in detect_heads(embedded, TEXTS, "induction", error_measure="abs").title


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"pattern": "inducton"},
            "unknown pattern 'inducton'\n"
            "  expected: one of previous_token, duplicate_token, induction, a matrix [q_pos, k_pos], or a function of "
            "the tokens [pos]\n  nearest: induction, duplicate_token",
        ),
        (
            {"pattern": torch.eye(3)},
            "the pattern does not fit the text\n  expected: [q_pos=5, k_pos=5], the row's real tokens\n  got: [3, 3]\n"
            "  fix: a function of the tokens, for rows of different lengths",
        ),
        (
            {"pattern": torch.ones(5, 5)},
            "the pattern looks ahead\n  expected: a lower-triangular matrix\n  fix: pattern.tril()",
        ),
        (
            {"pattern": torch.eye(5) / 2},
            "error_measure='mul' is the share of attention on a pattern\n  expected: 0 and 1 alone\n"
            "  got: values from 0 to 0.5\n  fix: error_measure='abs'",
        ),
        ({"error_measure": "max"}, "unknown error_measure 'max'\n  expected: 'mul' or 'abs'"),
        ({"heads": [(5, 0)]}, "there is no head L5H0\n  expected: layers 0 to 4, heads 0 to 7"),
        ({"heads": []}, "there is no head to score\n  expected: heads=None for all\n  got: none"),
    ],
)
def test_what_cannot_be_scored_is_said(embedded, given, message):
    arguments = {"pattern": "induction", **given}
    with pytest.raises(InvalidArgumentError) as error:
        detect_heads(embedded, torch.tensor([[1, 2, 3, 1, 2]]), arguments.pop("pattern"), **arguments)
    assert str(error.value) == message


def test_a_text_too_short_raises(embedded):
    def never(tokens):
        raise AssertionError("a row that cannot be scored needs no pattern")

    with pytest.raises(InvalidArgumentError) as error:
        detect_heads(embedded, torch.tensor([[1, 2]]), never, exclude_bos=True, exclude_current_token=True)
    assert str(error.value) == "row 0 is too short to be scored\n  expected: 3 tokens or more\n  got: 2"


# --- scores on repeated random tokens -------------------------------------------------------------------------------


@pytest.fixture
def period():
    return 20


def test_a_perfect_head_of_each_kind_scores_one_and_others_stay(embedded, period):
    """Patterns written into two heads: what they are scored by is the definition, position by position."""

    def plant(pattern, hook):
        pattern[:, [3, 5]] = 0
        for q in range(1, pattern.shape[2]):
            pattern[:, 5, q, q - 1] = 1
            if q > period:
                pattern[:, 3, q, q - period + 1] = 1

    before = head_scores(embedded, period=period)
    with embedded.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", plant)]):
        planted = head_scores(embedded, period=period)
    assert planted.induction[2, 3] == 1
    assert planted.previous_token[2, 3] == 0
    assert planted.previous_token[2, 5] == 1
    assert planted.induction[2, 5] == 0
    assert torch.equal(planted.induction[2, [0, 1, 2, 4, 6, 7]], before.induction[2, [0, 1, 2, 4, 6, 7]])
    assert strongest(planted.induction, 1)[0] == Head(2, 3, 1.0)


def test_the_head_of_the_models_card_is_found(embedded):
    """The card measures on blocks of 100 tokens: 0.980, layer 4, head 3. Random texts differ by some hundredths."""
    scores = head_scores(embedded, period=100)
    assert strongest(scores.induction, 1)[0] == Head(4, 3, pytest.approx(0.98, abs=0.01))
    assert strongest(scores.previous_token, 1)[0] == Head(3, 1, pytest.approx(0.90, abs=0.03))


def test_the_text_is_bos_and_one_random_block_twice(embedded, period):
    seen = []

    def keep(embedding, hook):
        seen.append(embedding)

    with embedded.hooks(fwd_hooks=[("hook_embed", keep)]):
        first = head_scores(embedded, rows=2, period=period, seed=7)
        again = head_scores(embedded, rows=2, period=period, seed=7)
        other = head_scores(embedded, rows=2, period=period, seed=8)
    assert seen[0].shape[:2] == (2, 1 + 2 * period)
    assert torch.equal(seen[0][:, 1 : 1 + period], seen[0][:, 1 + period :])
    assert torch.equal(first.induction, again.induction)
    assert not torch.equal(first.induction, other.induction)


def test_the_period_is_at_most_half_the_context(embedded):
    assert head_scores(embedded, rows=1, period=1000).induction.shape == (5, 8)


def test_strongest_are_in_order_with_their_places():
    scores = torch.tensor([[0.1, 0.9], [0.4, 0.2]])
    assert strongest(scores, 3) == [
        Head(0, 1, pytest.approx(0.9)),
        Head(1, 0, pytest.approx(0.4)),
        Head(1, 1, pytest.approx(0.2)),
    ]
    assert len(strongest(scores, 99)) == 4
    assert str(Head(3, 7, 0.5)) == "L3H7"


def test_scores_print_the_strongest_and_plot_each_kind():
    values = {
        "induction": torch.tensor([[0.1, 0.9], [0.4, 0.2]])[..., None],
        "previous_token": torch.tensor([[0.5, 0.0], [0.0, 0.25]])[..., None],
    }
    scores = HeadScores(values, {"layer": (0, 1), "head": (0, 1)}, what="each head", span=(0, 1))
    assert str(scores) == (
        "induction and previous_token of each head\n"
        "layer  head  induction  previous_token\n"
        "    0     1     0.9000          0.0000\n"
        "    1     0     0.4000          0.0000\n"
        "    1     1     0.2000          0.2500\n"
        "    0     0     0.1000          0.5000"
    )
    assert scores.plot().data[0].z[0] == [0.1, 0.9]
    assert scores.plot("previous_token").data[0].z[1] == [0.0, 0.25]


def test_scores_are_of_each_text(embedded):
    three, (first,) = head_scores(embedded, rows=3, period=10), [head_scores(embedded, rows=1, period=10)]
    assert three.of("induction").shape == (5, 8, 3)
    assert three.standard_error().shape == (5, 8)
    assert first.title == "induction and previous_token of each head, in attention from 0 to 1"
    assert three.title == f"{first.title}; mean over 3 texts"
