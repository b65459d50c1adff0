"""Patchscopes are what plain hooks give; at the end of the target they are the logit lens."""

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import logit_lens, patchscope
from clearspan.errors import InvalidArgumentError

SOURCE, TARGET = "def area(self):\n    return self.width", " width line height x other mode\n width line height"
PLACE = 5
"""Position of ` x` in the target."""


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot("tiny-bigcode")


def stream(depth):
    return "blocks.0.hook_resid_pre" if not depth else f"blocks.{depth - 1}.hook_resid_post"


def patched(bridge, tokens, state, into, position):
    """Logits of a run in which a plain hook writes a state."""

    def write(value, hook):
        value[:, position] = state

    return bridge.run_with_hooks(tokens, fwd_hooks=[(stream(into), write)])


@torch.no_grad()
def test_every_pair_of_depths_is_what_a_plain_hook_gives(bridge):
    found = patchscope(bridge, SOURCE, TARGET, source_position=2, target_position=PLACE, k=3, progress=False)
    _, cache = bridge.run_with_cache(SOURCE)
    tokens = bridge.to_tokens(TARGET)
    for read in range(6):
        for into in range(6):
            probs = patched(bridge, tokens, cache[stream(read)][0, 2], into, PLACE)[0, -1].softmax(-1)
            torch.testing.assert_close(found.top_probs[read, into].float(), probs.topk(3).values, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(probs[found.top_ids[read, into]], probs.topk(3).values, rtol=1e-4, atol=1e-6)
    assert found.source_depths == found.target_depths == ("embed", "0", "1", "2", "3", "4")
    assert found.texts == ()
    assert found.unpatched_ids[0] == bridge.to_single_token(" x")


@torch.no_grad()
def test_written_at_the_last_position_and_depth_it_is_the_logit_lens(bridge):
    found = patchscope(bridge, SOURCE, TARGET, target_depths=-1, k=1, progress=False)
    lens = logit_lens(bridge, SOURCE)
    assert found.top_ids[:, 0, 0].tolist() == lens.top_ids[:, -1].tolist()
    torch.testing.assert_close(found.top_probs[:, 0, 0].float(), lens.top_probs[:, -1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_mapping_makes_what_is_written(bridge):
    asked = []

    def mapping(state, depth, into):
        asked.append((depth, into))
        return 2 * state.mul_(-1)  # the state that it is given is its own

    depths = {"source_depths": [0, 3], "target_depths": [1, -1]}
    found = patchscope(bridge, SOURCE, TARGET, target_position=PLACE, mapping=mapping, k=1, progress=False, **depths)
    _, cache = bridge.run_with_cache(SOURCE)
    assert asked == [(0, 1), (0, 5), (3, 1), (3, 5)]
    assert found.source_depths == ("embed", "2")
    for row, read in enumerate((0, 3)):
        probs = patched(bridge, bridge.to_tokens(TARGET), -2 * cache[stream(read)][0, -1], 1, PLACE)[0, -1].softmax(-1)
        torch.testing.assert_close(found.top_probs[row, 0, 0].float(), probs.max(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_texts_are_what_a_greedy_loop_with_a_plain_hook_gives(bridge):
    settings = {"target_position": PLACE, "source_depths": [0, 1], "target_depths": [0, 1], "progress": False}
    found = patchscope(bridge, SOURCE, TARGET, max_new_tokens=4, k=1, **settings)
    _, cache = bridge.run_with_cache(SOURCE)
    for read in range(2):
        for into in range(2):
            tokens = prompt = bridge.to_tokens(TARGET)
            for _ in range(4):
                logits = patched(bridge, tokens, cache[stream(read)][0, -1], into, PLACE)
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            assert found.texts[read][into] == bridge.to_string(tokens[0, prompt.shape[1] :])
    assert found.texts[0][0].startswith("width")


def test_another_model_without_a_tokenizer():
    bridge = clearspan.boot(build("llama"))
    source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6]])
    found = patchscope(bridge, source, target, k=2, progress=False)
    assert found.top_ids.shape == (4, 4, 2)
    with torch.no_grad():
        expected = bridge(source)[0, -1].argmax()
    assert found.top_ids[-1, -1, 0] == expected, "the last state at the last place is the source's own prediction"


def test_it_prints_and_draws(bridge):
    found = patchscope(
        bridge, SOURCE, TARGET, target_position=PLACE, source_depths=[0, 1], max_new_tokens=1, progress=False
    )
    assert found.to_dataframe().columns.tolist() == ["source", "target", "predicts", "probability", "text"]
    assert "unpatched ·x" in str(found)
    figure = found.plot()
    assert list(figure.data[0].y) == ["embed", "0"]
    assert figure.data[0].text[0][0] == found.predicts[0][0] == "width"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ["a", "b"]}, r"source is one prompt\n  expected: an input of one row\n  got: 2 rows"),
        ({"target": ["a", "b"]}, "target is one prompt"),
        ({"source_position": 40}, "source_position"),
        ({"target_position": -40}, "target_position"),
        ({"source_depths": 6}, "there is no depth 6"),
        ({"target_depths": []}, "there is no depth to read"),
        ({"k": 0}, "k=0"),
        ({"k": 10**9}, "k=1000000000 tokens cannot be kept"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"mapping": lambda state, depth, into: state[:3]}, r"no hidden state\n  expected: \[256\]\n  got: \[3\]"),
    ],
)
def test_wrong_arguments(bridge, settings, message):
    given = {"source": SOURCE, "target": TARGET, "progress": False, **settings}
    with pytest.raises(InvalidArgumentError, match=message):
        patchscope(bridge, **given)
