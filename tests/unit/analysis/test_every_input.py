"""Lenses, heads, attribution and probes take every kind of input, and read each row as if it stood alone."""

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import (
    detect_heads,
    direct_logit_attribution,
    lens_divergence,
    lens_readings,
    logit_lens,
    train_probe,
    train_tuned_lens,
)
from clearspan.errors import ClearspanError, InputError

ROWS = [[5, 9, 5, 30, 9, 5], [7, 7, 2, 11]]
VARIANTS = ["gpt_bigcode", "llama", "gemma2", "bloom"]


def padded(side, hole=None):
    """Rows as ids and mask, filled on one side; a hole is a column of padding before a token."""
    tokens, mask = torch.full((2, 7), 3), torch.zeros(2, 7, dtype=torch.long)
    for number, row in enumerate(ROWS):
        columns = [column for column in range(7) if column != hole][: len(row)]
        columns = columns if side == "right" else [column + 6 - columns[-1] for column in columns]
        tokens[number, columns], mask[number, columns] = torch.tensor(row), 1
    return tokens, mask


def masked(tokens, mask):
    return tokens, {"attention_mask": mask}


FORMS = {
    "left": lambda bridge: masked(*padded("left")),
    "right": lambda bridge: masked(*padded("right")),
    "holes": lambda bridge: masked(*padded("right", hole=2)),
    "holes on the left": lambda bridge: masked(*padded("left", hole=3)),
    "array": lambda bridge: masked(padded("left")[0].numpy(), padded("left")[1].numpy()),
    "lists": lambda bridge: (ROWS, {}),
    "rows of a tensor": lambda bridge: ([torch.tensor(row) for row in ROWS], {}),
    "a tokenizer's output": lambda bridge: ({"input_ids": padded("left")[0], "attention_mask": padded("left")[1]}, {}),
    "a data set": lambda bridge: ([{"input_ids": row} for row in ROWS], {}),
    "a batch": lambda bridge: (bridge.to_batch(*padded("left")), {}),
    "embeddings": lambda bridge: masked(bridge.embed.module(padded("left")[0]).detach(), padded("left")[1]),
}
MATRIX = torch.ones(6, 6).tril()
LABELS = [["a", "b"] * 3, ["b", "a"] * 2]


def readings(bridge, input, **mask):
    return lens_readings(bridge, input, positions=-2, targets=[3, 4], top_k=1, **mask).target_log_probs.T


def detected(bridge, input, **mask):
    return detect_heads(bridge, input, "induction", exclude_bos=True, **mask).of().movedim(-1, 0)


def attributed(bridge, input, **mask):
    return direct_logit_attribution(bridge, input, [3, 4], 5, unit="head", pos=-2, **mask).per_row


def probed(bridge, input, **mask):
    found = train_probe(bridge, input, LABELS, positions=None, layers=1, folds=2, controls=0, **mask)
    assert found.places == tuple((row, place) for row, ids in enumerate(ROWS) for place in range(len(ids)))
    return found.at(1).means


FUNCTIONS = {"readings": readings, "detected": detected, "attributed": attributed, "probed": probed}


@pytest.fixture(scope="module", params=VARIANTS)
def bridge(request):
    settings = {"sliding_window": 64} if request.param == "gemma2" else {}  # a window counts columns
    return clearspan.boot(build(request.param, **settings))


@torch.no_grad()
def alone(bridge, name):
    """What each row gives by itself, without padding."""
    rows = [torch.tensor([row]) for row in ROWS]
    match name:
        case "readings":
            found = [lens_readings(bridge, row, positions=len(row[0]) - 2, targets=target, top_k=1)
                     for row, target in zip(rows, (3, 4), strict=True)]  # fmt: skip
            return torch.cat([one.target_log_probs.T for one in found])
        case "detected":
            return torch.cat([detected(bridge, row) for row in rows])
        case "attributed":
            found = [direct_logit_attribution(bridge, row, answer, 5, unit="head", pos=len(row[0]) - 2)
                     for row, answer in zip(rows, (3, 4), strict=True)]  # fmt: skip
            return torch.cat([one.per_row for one in found])
    values = torch.cat([bridge.run_with_cache(row)[1]["resid_post", 1][0] for row in rows])
    of_class = torch.tensor([label == "b" for own in LABELS for label in own])
    return torch.stack([values[~of_class].mean(0), values[of_class].mean(0)]).double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_of_an_input_reads_each_row_as_alone(bridge, form, name):
    given, mask = FORMS[form](bridge)
    if form == "embeddings" and name == "detected":
        with pytest.raises(InputError, match="this needs token ids"):
            detected(bridge, given, **mask)
        return
    torch.testing.assert_close(FUNCTIONS[name](bridge, given, **mask), alone(bridge, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_corpora_in_every_form_are_read_by_real_tokens(bridge, form):
    given, mask = FORMS[form](bridge)
    corpus = bridge.to_batch(given, **mask)

    def other(resid, depth):
        return resid.roll(depth, -1)

    if form == "embeddings":
        with pytest.raises(ClearspanError):
            lens_divergence(bridge, corpus, other)
        return
    found = lens_divergence(bridge, corpus, other)
    each = [lens_readings(bridge, [row], positions=None, lens=other).kl for row in ROWS]
    torch.testing.assert_close(found.tuned_lens, torch.cat(each, dim=1).mean(1), rtol=1e-3, atol=1e-4)
    assert found.positions == sum(map(len, ROWS))
    losses = train_tuned_lens(bridge, corpus, steps=1, batch_size=2).losses[0]
    torch.testing.assert_close(losses, found.logit_lens[:-1], rtol=1e-3, atol=1e-4)


def test_a_logit_lens_shows_the_real_tokens_of_its_row(bridge):
    tokens, mask = padded("right", hole=2)
    found = logit_lens(bridge, tokens[:1], attention_mask=mask[:1])
    expected = logit_lens(bridge, [ROWS[0]])
    assert found.tokens == expected.tokens == tuple(ROWS[0])
    assert torch.equal(found.top_ids, expected.top_ids)
    torch.testing.assert_close(found.top_probs, expected.top_probs, rtol=1e-3, atol=1e-5)
    embedded = logit_lens(bridge, bridge.embed.module(torch.tensor(ROWS[:1])))
    assert embedded.tokens == ()
    torch.testing.assert_close(embedded.top_probs, expected.top_probs, rtol=1e-3, atol=1e-5)


def test_a_matrix_is_a_pattern_for_embeddings(bridge):
    embeddings = bridge.embed.module(torch.tensor(ROWS[:1])).detach()
    found = detect_heads(bridge, embeddings, MATRIX, exclude_current_token=True)
    torch.testing.assert_close(found.scores, torch.ones(bridge.cfg.n_layers, bridge.cfg.n_heads))


def test_each_row_may_have_a_position_of_its_own(bridge):
    found = direct_logit_attribution(bridge, ROWS, [3, 4], pos=[[4], [1]])
    assert found.positions == (4, 1)
    for row, (own, answer, place) in enumerate(zip(ROWS, (3, 4), (4, 1), strict=True)):
        one = direct_logit_attribution(bridge, [own], answer, pos=place)
        torch.testing.assert_close(found.per_row[row], one.per_row[0], rtol=1e-3, atol=1e-4)
    read = lens_readings(bridge, ROWS, positions=[[0, 5], [-1]])
    assert read.places == ((0, 0), (0, 5), (1, 3))
