import pytest
import torch
from tests.conftest import tiny_model
from tests.zoo import build

import clearspan
from clearspan.analysis import Unembedding, lens_readings, logit_lens
from clearspan.errors import InvalidArgumentError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.tensor([[5, 9, 2, 40, 7], [3, 3, 8, 1, 60]])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2", "opt post-norm"])
def test_a_matrix_reads_what_the_last_norm_gives(variant):
    bridge = clearspan.boot(build(variant))
    matrix = drawn(bridge.cfg.d_model, 6)
    _, cache = bridge.run_with_cache(TOKENS)
    found = lens_readings(bridge, TOKENS, positions=[1, -1], depths=[1, -1], unembed=matrix, targets=[4, 0], top_k=3)
    for index, stream in enumerate((cache["resid_post", 0], cache["resid_post", bridge.cfg.n_layers - 1])):
        read = stream if "post-norm" in variant else bridge.ln_final(stream)
        expected = (read @ matrix).log_softmax(-1)[:, [1, -1]].flatten(0, 1)
        torch.testing.assert_close(found.top_log_probs[index], expected.topk(3).values)
        targets = expected[torch.arange(4), torch.tensor([4, 4, 0, 0])]
        torch.testing.assert_close(found.target_log_probs[index], targets)
    torch.testing.assert_close(found.kl[-1], torch.zeros(4))


@torch.no_grad()
def test_the_models_own_unembedding_gives_its_own_readings():
    bridge = clearspan.boot(build("llama"))
    own = lens_readings(bridge, TOKENS)
    for same in (bridge.W_U, Unembedding(bridge.W_U, bias=bridge.b_U), bridge):
        found = lens_readings(bridge, TOKENS, unembed=same)
        torch.testing.assert_close(found.top_log_probs, own.top_log_probs)
        torch.testing.assert_close(found.kl, own.kl, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_another_model_reads_with_its_own_norm_and_cap_in_its_own_dtype():
    bridge = clearspan.boot(build("gpt2"))
    other = clearspan.boot(build("gemma2", hidden_size=48, vocab_size=31).bfloat16())
    found = lens_readings(bridge, TOKENS, unembed=other, top_k=4)
    _, cache = bridge.run_with_cache(TOKENS)
    expected = other.read_out(cache["resid_post", 0].bfloat16())[:, -1].float().log_softmax(-1)
    torch.testing.assert_close(found.top_log_probs[1], expected.topk(4).values, rtol=1e-3, atol=1e-3)
    assert found.top_log_probs.dtype == torch.float32
    assert int(found.top_ids.max()) < 31


def test_labels_name_columns_and_targets(bridge):
    matrix = drawn(bridge.cfg.d_model, 3)
    named = Unembedding(matrix, ["code", "text", "number"])
    found = lens_readings(bridge, ["import os", "x"], unembed=named, targets=["text", "code"])
    assert set(found.columns()["predicts"]) <= {"code", "text", "number"}
    assert found.target_ids.tolist() == [1, 0]
    assert found.top_ids.shape == (bridge.cfg.n_layers + 1, 2, 3)
    plain = lens_readings(bridge, "x", unembed=matrix)
    assert plain.columns()["predicts"][0] in {"#0", "#1", "#2"}
    lens = logit_lens(bridge, "import os", unembed=named)
    assert lens.texts[1] == "import"
    figure = lens.plot()
    assert figure.data[0].text[0][0] in {"code", "text", "number"}
    assert "import" in figure.data[0].y[1]


@torch.no_grad()
def test_a_stream_may_be_read_as_it_is():
    bridge = clearspan.boot(tiny_model())
    matrix, bias = drawn(48, 4), drawn(4, seed=1)
    found = lens_readings(bridge, TOKENS, unembed=Unembedding(matrix, bias=bias, is_normed=False), top_k=1)
    _, cache = bridge.run_with_cache(TOKENS)
    expected = (cache["resid_post", 0][:, -1] @ matrix + bias).log_softmax(-1)
    torch.testing.assert_close(found.top_log_probs[1, :, 0], expected.amax(-1))


def test_hooks_take_no_part_in_the_reading():
    bridge, other, calls = clearspan.boot(tiny_model()), clearspan.boot(tiny_model()), []
    other.add_hook("ln_final.hook_in", lambda value, hook: calls.append(hook.name))
    lens_readings(bridge, TOKENS, unembed=other)
    assert calls == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(47, 2), "reads a stream of another width\n  expected: d_model=48\n  got: 47"),
        (torch.ones(48), r"an unembedding is a matrix\n  expected: \[d_model, n\]\n  got: torch.float32 \[48\]"),
        ("W_U", "this is no unembedding\n  expected: a matrix"),
        (clearspan.boot(build("llama", hidden_size=32)), "reads a stream of another width"),
    ],
)
def test_what_reads_no_stream_is_named(given, message):
    with pytest.raises(InvalidArgumentError, match=message):
        lens_readings(clearspan.boot(tiny_model()), TOKENS, unembed=given)


def test_labels_and_targets_that_are_not_there_are_named():
    for labels in (["a"], ["a", "a"], "ab", [1, 2]):
        with pytest.raises(InvalidArgumentError, match="labels are one text for each column"):
            Unembedding(torch.ones(48, 2), labels)
    with pytest.raises(InvalidArgumentError, match="a bias is one for each column"):
        Unembedding(torch.ones(48, 2), bias=torch.ones(3))
    bridge, named = clearspan.boot(tiny_model()), Unembedding(torch.ones(48, 2), ["good", "bad"])
    with pytest.raises(InvalidArgumentError) as error:
        lens_readings(bridge, TOKENS, unembed=named, targets="god")
    assert str(error.value) == "no column is labelled 'god'\n  expected: good, bad\n  nearest: good"
    with pytest.raises(
        InvalidArgumentError, match="targets are one column for each row\n  expected: 2 columns, from 0 to 1"
    ):
        lens_readings(bridge, TOKENS, unembed=named, targets=2)
