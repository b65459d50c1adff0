import json

import pytest
import torch

from clearspan.analysis import report
from clearspan.errors import InputError

TEXT = "def area(self):\n    return self.width"


@pytest.fixture(scope="module")
def found(bridge):
    return report(bridge, TEXT)


def test_tokens_spell_the_text_after_bos(found):
    assert found.tokens[0] == "<|endoftext|>"
    assert "".join(found.tokens[1:]) == TEXT


def test_the_model_is_described(bridge, found):
    assert found.model.name == "tiny-bigcode"
    assert found.model.layers == bridge.cfg.n_layers
    assert found.model.parameters == bridge.hf_model.num_parameters()


def test_patterns_are_those_of_the_text(bridge, found):
    _, cache = bridge.run_with_cache(TEXT, names_filter="blocks.3.attn.hook_pattern")
    torch.testing.assert_close(found.patterns[3], cache["pattern", 3][0])
    torch.testing.assert_close(found.patterns.sum(-1), torch.ones(found.patterns.shape[:-1]))


def test_data_survives_json_and_keeps_every_figure(found):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(data) == [
        "model", "text", "tokens", "logit_lens", "head_scores", "causal_effect", "attention"
    ]  # fmt: skip
    assert [token["id"] for token in data["tokens"]] == list(found.token_ids)
    assert data["tokens"][0]["probability"] is None
    assert data["tokens"][3]["probability"] == pytest.approx(float(found.predictions.next_probs[2]), abs=1e-6)
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


def test_every_stage_is_reported(bridge):
    steps = []
    report(bridge, "x", progress=lambda *step: steps.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in steps))
    assert stages == ["predictions", "logit lens", "head scores", "attention patterns", "causal effect"]


def test_empty_text_is_refused(bridge):
    with pytest.raises(InputError) as error:
        report(bridge, "")
    assert str(error.value) == "cannot report on an empty text\n  expected: at least one character"


def test_a_text_longer_than_the_context_is_refused(bridge):
    text = "\n".join("x" for _ in range(400))
    count = bridge.to_tokens(text).shape[1]
    with pytest.raises(InputError) as error:
        report(bridge, text)
    assert str(error.value) == (
        f"the text is {count} tokens long, and tiny-bigcode reads at most 512\n"
        f"  fix: shorten it by {count - 512} tokens (about {1 - 512 / count:.0%} of its {len(text)} characters)"
    )
