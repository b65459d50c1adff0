import json

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import causal_effect, predictions, report
from clearspan.errors import InputError, InvalidArgumentError, NotFiniteError, NoTokenizerError
from clearspan.interventions import Intervention, Zero
from clearspan.view import html_page

TEXT = "def area(self):\n    return self.width"
TEXTS = ["import os", TEXT, "x = 1, 2"]


@pytest.fixture(scope="module")
def random_bridge():
    return clearspan.boot(build("gpt_bigcode"))


# --- predictions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predictions_are_the_softmax_of_each_rows_own_logits(embedded, side, batch_size):
    found = predictions(embedded, embedded.to_batch(TEXTS, padding_side=side), k=3, batch_size=batch_size)
    places = []
    for row, text in enumerate(TEXTS):
        tokens = embedded.to_tokens(text)[0]
        probs = embedded(text)[0].softmax(-1)
        own = [number for number, place in enumerate(found.places) if place[0] == row]
        places += [(row, position) for position in range(len(tokens))]
        assert torch.equal(found.tokens[own], tokens)
        torch.testing.assert_close(found.top_probs[own], probs.topk(3).values, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.top_ids[own, 0], probs.argmax(-1))
        assert found.token_probs[own[0]].isnan()
        expected = probs[:-1].gather(-1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(found.token_probs[own[1:]], expected, rtol=1e-4, atol=1e-6)
    assert found.places == tuple(places)


def test_predictions_of_every_kind_of_input_are_the_same(embedded):
    whole = predictions(embedded, TEXT)
    ids = embedded.to_tokens(TEXT)
    for given in (
        [TEXT],
        ids,
        ids[0],
        ids[0].numpy(),
        ids[0].tolist(),
        ids.tolist(),
        {"text": TEXT},
        [{"text": TEXT}],
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        embedded.to_batch(TEXT),
    ):
        assert str(predictions(embedded, given)) == str(whole)
    padded, mask = torch.cat([ids, ids[:, :2]], 1), torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :2])], 1)
    assert predictions(embedded, padded, attention_mask=mask).places == whole.places


@torch.no_grad()
def test_predictions_of_given_logits(embedded):
    batch = embedded.to_batch(TEXTS)
    changed = embedded(batch, interventions=[Intervention("attn_out", Zero(), layer=2)])
    found = predictions(embedded, batch, logits=changed)
    rows, columns, _ = batch.places(None)
    assert torch.equal(found.top_ids[:, 0], changed[rows, columns].argmax(-1))
    assert not torch.equal(found.top_ids, predictions(embedded, batch).top_ids)
    for wrong in (changed[:2], changed[0], "logits", changed[:, :-1]):
        with pytest.raises(InvalidArgumentError, match="`logits` are not those of the input"):
            predictions(embedded, batch, logits=wrong)


def test_predictions_print_and_plot(embedded):
    found = predictions(embedded, TEXT, k=2)
    table = found.to_dataframe()
    assert table["position"].tolist() == list(range(len(found.tokens)))
    assert table["token"].tolist()[1:3] == ["def", "·a"]
    assert table["p 1"].tolist() == pytest.approx(found.top_probs[:, 0].tolist())
    assert str(found).startswith("probability of each token, and the likeliest next ones, of 1 row\n")
    (grid,) = found.plot().data
    assert grid.text[-1][0] == table["next 1"].tolist()[-1]


def test_a_model_that_returns_nan_is_refused():
    broken = clearspan.boot("tiny-bigcode")
    with torch.no_grad():
        next(broken.hf_model.parameters()).fill_(torch.nan)
    for function in (predictions, causal_effect, report):
        with pytest.raises(NotFiniteError) as error:
            function(broken, torch.tensor([[0, 1]]))
        assert str(error.value) == (
            "the model's logits are not numbers (NaN), so it predicts nothing\n"
            "  where: tiny-bigcode, weights in torch.float32\n"
            "  fix: clearspan.boot(model, dtype=torch.float32), if they overflow"
        )


# --- effect ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_cell_is_one_run_with_a_hook(variant, side):
    bridge = clearspan.boot(build(variant))
    rows = [torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (6, 1, 4)]
    found = causal_effect(bridge, bridge.to_batch(rows, padding_side=side))
    assert found.of().shape == (bridge.cfg.n_layers, 6, 3)
    for row, tokens in enumerate(rows):
        log_probs = bridge(tokens)[0, -1].log_softmax(-1)
        target = int(log_probs.argmax())
        assert found.targets[row] == target
        for layer in range(bridge.cfg.n_layers):
            assert found.of()[layer, len(tokens) :, row].isnan().all()
            for position in range(len(tokens)):

                def ablate(resid, hook, position=position):
                    resid[:, position] = resid[:, 1:].mean(1) if resid.shape[1] > 1 else resid[:, 0]

                logits = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", ablate)])
                naive = logits[0, -1].log_softmax(-1)[target]
                # Log-probabilities of size 10 to 100, padded and alone, in float32.
                torch.testing.assert_close(found.of()[layer, position, row], naive, rtol=1e-3, atol=1e-3)


def test_the_drop_is_how_much_the_log_probability_falls(embedded):
    found = causal_effect(embedded, TEXT)
    assert found.log_prob == pytest.approx(found.base["log probability"].item())
    torch.testing.assert_close(found.drop, found.log_prob - found.of()[..., 0])
    assert found.labels["position"][1] == "1 def"
    assert found.plot().data[0].type == "heatmap"
    assert causal_effect(embedded, TEXT, memory=1).drop.allclose(found.drop, atol=1e-4)


def test_a_single_token_has_nothing_to_be_replaced_by(embedded):
    assert not causal_effect(embedded, [5]).drop.abs().gt(1e-5).any()


def test_hooks_and_training_are_refused(random_bridge):
    with (
        random_bridge.hooks([("blocks.0.hook_resid_pre", lambda value, hook: None)]),
        pytest.raises(InvalidArgumentError),
    ):
        causal_effect(random_bridge, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("drop", "bound"),
    [
        ([[0.5, -2.0, 9.0]], 2.0),  # the last position does not count
        ([[0.001, 9.0]], 0.9),  # unless the others are noise to it
        ([[3.0]], 0.3),
        ([[0.0, 0.0]], 1e-4),
    ],
)
def test_the_full_colour_is_the_largest_effect_before_the_last_position(drop, bound):
    values, base = -torch.tensor(drop)[..., None], torch.zeros(1)
    axes = {"layer": (0,), "position": tuple(range(len(drop[0])))}
    assert clearspan.analysis.CausalEffect({"p": values}, axes, {"p": base}).bound == pytest.approx(bound)


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(embedded):
    return report(embedded, TEXT)


def test_tokens_spell_the_text_after_bos(found):
    assert found.tokens[0] == "<|endoftext|>"
    assert "".join(found.tokens[1:]) == found.text == TEXT


def test_the_model_is_described(embedded, found):
    assert found.model.name == "tiny-bigcode"
    assert found.model.layers == embedded.cfg.n_layers
    assert found.model.parameters == embedded.hf_model.num_parameters()


def test_patterns_are_those_of_the_text(embedded, found):
    _, cache = embedded.run_with_cache(TEXT, names_filter="blocks.3.attn.hook_pattern")
    torch.testing.assert_close(found.patterns[3], cache["pattern", 3][0])
    torch.testing.assert_close(found.patterns.sum(-1), torch.ones(found.patterns.shape[:-1]))


def test_data_survives_json_and_keeps_every_figure(found):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(data) == [
        "model", "text", "tokens", "logit_lens", "head_scores", "causal_effect", "attention"
    ]  # fmt: skip
    assert [token["id"] for token in data["tokens"]] == list(found.token_ids)
    assert data["tokens"][0]["probability"] is None
    assert data["tokens"][3]["probability"] == pytest.approx(float(found.predictions.token_probs[3]), abs=1e-6)
    last = data["tokens"][-1]["predictions"][0]
    assert data["causal_effect"]["target"] == {"id": last["id"], "text": last["text"]}
    assert data["logit_lens"][-1]["ids"][-1] == last["id"]
    assert [row["depth"] for row in data["logit_lens"]] == ["embed", "0", "1", "2", "3", "4"]
    for values, tensor in (
        (data["attention"], found.patterns),
        (data["causal_effect"]["drop"], found.effect.drop),
        (data["head_scores"]["induction"], found.heads.induction),
        (data["head_scores"]["previous_token"], found.heads.previous_token),
    ):
        torch.testing.assert_close(torch.tensor(values), tensor, rtol=0, atol=1e-6)


def test_every_stage_is_told(embedded):
    steps = []
    report(embedded, "x", progress=lambda *step: steps.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in steps))
    assert stages == ["predictions", "logit lens", "head scores", "attention patterns", "causal effect"]
    assert steps[-1][1] == steps[-1][2]


def test_a_report_on_token_ids_alone_labels_them_by_their_ids(random_bridge):
    found = report(random_bridge, [5, 90, 7])
    assert (found.text, found.tokens, found.target) == ("", ("#5", "#90", "#7"), f"#{found.effect.targets[0]}")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [token["text"] for token in data["tokens"]] == ["#5", "#90", "#7"]
    assert html_page(found).count('class="token"') == 3


def test_padding_is_no_part_of_a_report(embedded, found):
    ids = embedded.to_tokens(TEXT)
    for before, after in ((0, 2), (3, 0), (1, 1)):
        padded = torch.nn.functional.pad(ids, (before, after), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
        assert {**report(embedded, padded, attention_mask=mask).to_dict(), "text": TEXT} == found.to_dict()


@pytest.mark.parametrize("given", ["", [], [""]])
def test_empty_text_is_refused(embedded, given):
    with pytest.raises(InputError):
        report(embedded, given)


def test_what_is_not_one_text_is_refused(embedded, random_bridge):
    with pytest.raises(InvalidArgumentError, match="a report is about one text"):
        report(embedded, ["a", "b"])
    with pytest.raises(InputError, match="the input is longer than the model's context"):
        report(embedded, "\n".join("x" for _ in range(400)))
    with pytest.raises(NoTokenizerError):
        report(random_bridge, "text")
