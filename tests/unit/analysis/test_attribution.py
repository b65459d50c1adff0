import pytest
import torch
from tests.zoo import build
from torch.utils._python_dispatch import TorchDispatchMode

import clearspan
from clearspan.analysis import direct_logit_attribution
from clearspan.errors import InputError, InvalidArgumentError

VARIANTS = ["gpt_bigcode", "llama biases", "gemma2", "gpt_neox", "opt", "granite", "cohere2", "mixtral", "deepseek_v3"]
UNITS = ["component", "layer", "head", "neuron"]
TEXTS = ["import os, sys", "def f(self, x):\n    return x"]


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param))


@pytest.fixture
def rows():
    return torch.randint(1, 97, (3, 6), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def mask():
    """Padding on either side, so that the last real tokens are in two columns."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = mask[2, 4:] = 0
    return mask


def units_of(bridge):
    return [unit for unit in UNITS if unit != "neuron" or not bridge.why_absent("blocks.1.mlp.hook_post")]


def before_cap(bridge, logits):
    cap = bridge.cfg.output_logits_soft_cap
    return logits if cap is None else cap * torch.atanh(logits.double() / cap).float()


@torch.no_grad()
def effect(bridge, tokens, answers, parts, clean):
    """What logits lose at the last position when parts are taken from the last stream, at the clean run's scale."""

    def take(resid, hook):
        resid[:, -1] -= parts

    hooks = [
        (f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post", take),
        ("ln_final.hook_scale", lambda scale, hook: clean[hook.name]),
    ]
    lost = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    each = torch.arange(len(tokens))
    return (before_cap(bridge, clean["hook_logits"]) - before_cap(bridge, lost))[each, -1, answers]


@torch.no_grad()
def written(bridge, tokens, layer, part, name, index, clean):
    """What a head or neuron adds: the sublayer's output with it, less that without it, at the clean run's scale."""

    def zero(value, hook):
        value[:, :, index] = 0

    hooks = [(name, zero)]
    scale = f"blocks.{layer}.{'ln1_post' if part == 'attn' else 'ln2_post'}.hook_scale"
    if scale in bridge.hook_dict:
        hooks.append((scale, lambda value, hook: clean[scale]))
    out = f"blocks.{layer}.hook_{part}_out"
    with bridge.hooks(fwd_hooks=hooks):
        _, without = bridge.run_with_cache(tokens, out)
    return (clean[out] - without[out])[:, -1]


@torch.no_grad()
def test_every_part_is_what_the_logit_loses_without_it(random_bridge, rows):
    bridge, answers = random_bridge, torch.tensor([3, 50, 96])
    _, cache = bridge.run_with_cache(rows)
    found = direct_logit_attribution(bridge, rows, answers)
    names = {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}
    for label, values in zip(found.parts, found.per_row.T, strict=True):
        name = names.get(label) or "blocks.{}.hook_{}".format(*label.split("_", 1))
        expected = effect(bridge, rows, answers, cache[name][:, -1], cache)
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5)
    heads = direct_logit_attribution(bridge, rows, answers, unit="head")
    for layer in range(bridge.cfg.n_layers):
        for head in range(bridge.cfg.n_heads):
            part = written(bridge, rows, layer, "attn", f"blocks.{layer}.attn.hook_z", head, cache)
            values = heads.per_row[:, heads.parts.index(f"L{layer}H{head}")]
            torch.testing.assert_close(values, effect(bridge, rows, answers, part, cache), rtol=1e-3, atol=1e-5)
            assert heads.by_head[layer, head] == heads.attribution[layer * bridge.cfg.n_heads + head]
    if "neuron" in units_of(bridge):
        neurons = direct_logit_attribution(bridge, rows, answers, unit="neuron")
        for layer, neuron in [(0, 0), (1, 7), (2, 79)]:
            part = written(bridge, rows, layer, "mlp", f"blocks.{layer}.mlp.hook_post", neuron, cache)
            values = neurons.per_row[:, neurons.parts.index(f"L{layer}N{neuron}")]
            torch.testing.assert_close(values, effect(bridge, rows, answers, part, cache), rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pos", [-1, 1])
def test_parts_and_constant_sum_to_the_logit_of_each_row_alone(random_bridge, rows, mask, pos):
    bridge, answers, wrong = random_bridge, torch.tensor([3, 50, 96]), torch.tensor([7, 8, 9])
    own = []
    for row, real, answer, other in zip(rows, mask.bool(), answers, wrong, strict=True):
        logits = before_cap(bridge, bridge(row[real][None]))[0, pos]
        own.append(logits[answer] - logits[other])
    for unit in units_of(bridge):
        found = direct_logit_attribution(bridge, rows, answers, wrong, unit=unit, pos=pos, attention_mask=mask)
        assert found.positions == ((3, 5, 3) if pos == -1 else (1, 1, 1))
        torch.testing.assert_close(found.model, torch.stack(own), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.per_row.sum(1) + found.constant, torch.stack(own), rtol=1e-4, atol=1e-5)
        assert found.gap.abs().max() < 5e-6
        assert torch.equal(found.gap, found.total - found.model)


@torch.no_grad()
def test_a_difference_is_that_of_two_logits_and_layers_are_their_components(random_bridge, rows):
    bridge = random_bridge
    for unit in units_of(bridge):
        one, other, both = (
            direct_logit_attribution(bridge, rows, *answers, unit=unit) for answers in ((3,), (8,), (3, 8))
        )
        torch.testing.assert_close(both.per_row, one.per_row - other.per_row, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.constant, one.constant - other.constant, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.model, one.model - other.model)
    layers = direct_logit_attribution(bridge, rows, 3, unit="layer")
    parts = direct_logit_attribution(bridge, rows, 3)
    for layer in range(bridge.cfg.n_layers):
        expected = sum(parts.per_row[:, parts.parts.index(f"{layer}_{which}_out")] for which in ("attn", "mlp"))
        torch.testing.assert_close(layers.per_row[:, layers.parts.index(f"L{layer}")], expected)


@torch.no_grad()
def test_it_agrees_with_the_caches_own_tool(embedded):
    logits, cache = embedded.run_with_cache(TEXTS[1])
    stack, labels = cache.decompose_resid(return_labels=True, pos_slice=-1)
    found = direct_logit_attribution(embedded, TEXTS[1], "\n")
    assert list(found.parts) == labels
    torch.testing.assert_close(
        found.per_row[0], cache.logit_attrs(stack, "\n", pos_slice=-1)[:, 0], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(found.constant[0], cache.logit_constant("\n"))
    torch.testing.assert_close(found.model[0], logits[0, -1, embedded.to_single_token("\n")])


@pytest.mark.parametrize("unit", UNITS)
def test_texts_of_different_length_are_each_alone(embedded, unit):
    both = direct_logit_attribution(embedded, TEXTS, [",", "\n"], " x", unit=unit)
    for row, (text, answer) in enumerate(zip(TEXTS, [",", "\n"], strict=True)):
        alone = direct_logit_attribution(embedded, text, answer, " x", unit=unit)
        torch.testing.assert_close(both.per_row[row], alone.per_row[0], rtol=1e-4, atol=1e-4)
        assert both.positions[row] == alone.positions[0]
    assert both.answers.tolist() == [embedded.to_single_token(answer) for answer in (",", "\n")]


def test_one_answer_is_for_all_rows_in_every_form(embedded):
    token = embedded.to_single_token(" x")
    first, *others = (
        direct_logit_attribution(embedded, TEXTS, answer)
        for answer in (" x", token, torch.tensor(token), torch.tensor([token]), [" x", " x"])
    )
    for found in others:
        assert torch.equal(found.per_row, first.per_row)
        assert found.answers.tolist() == [token, token]


def test_hooks_on_the_bridge_are_seen(embedded):
    def zero(z, hook):
        z[:, :, 3] = 0

    clean = direct_logit_attribution(embedded, TEXTS[1], "\n", unit="head")
    with embedded.hooks(fwd_hooks=[("blocks.4.attn.hook_z", zero)]):
        found = direct_logit_attribution(embedded, TEXTS[1], "\n", unit="head")
        logit = embedded(TEXTS[1])[0, -1, embedded.to_single_token("\n")]
    assert found.by_head[4, 3] == 0
    assert clean.by_head[4, 3] != 0
    torch.testing.assert_close(found.total[0], logit)


def test_what_a_hook_writes_between_the_parts_is_the_gap(embedded):
    token = embedded.to_single_token("\n")
    written = torch.randn(embedded.cfg.d_model, generator=torch.Generator().manual_seed(1))

    def add(resid, hook):
        resid += written

    with embedded.hooks(fwd_hooks=[("blocks.4.hook_resid_post", add)]):
        found = direct_logit_attribution(embedded, TEXTS[1], "\n")
        _, cache = embedded.run_with_cache(TEXTS[1], ["ln_final.hook_scale"])
    read = (
        (written - written.mean()) * embedded.ln_final.w @ embedded.W_U[:, token] / cache["ln_final.hook_scale"][0, -1]
    )
    assert read.abs() > 0.05
    torch.testing.assert_close(-found.gap, read.detach(), rtol=1e-3, atol=1e-3)


def test_neurons_are_projected_as_they_are_made(embedded):
    """No tensor has neurons, rows and d_model."""
    sizes, rows = [], 6

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Sizes():
        direct_logit_attribution(embedded, torch.ones(rows, 3, dtype=torch.long), 5, unit="neuron")
    assert max(sizes) < rows * embedded.cfg.d_mlp * embedded.cfg.d_model


@pytest.mark.parametrize("variant", ["llama biases", "gemma2"])
def test_in_half_precision_the_gap_is_rounding(variant, rows):
    bridge = clearspan.boot(build(variant).bfloat16())
    for unit in UNITS:
        found = direct_logit_attribution(bridge, rows, 3, unit=unit)
        assert found.per_row.dtype == found.model.dtype == torch.float32
        # Up to 0.03 was measured over all architectures, on logits of size 0.3 to 4.
        assert 0 < found.gap.abs().max() < 0.05


def test_it_prints_and_ranks(embedded):
    found = direct_logit_attribution(embedded, TEXTS[0], ",", "\n", unit="head")
    assert found.title == (
        "direct attribution of the logit of , less that of ⏎ to each head: "
        f"sum {found.total.item():.4f} with a constant of {found.constant.item():.4f}, "
        f"the model's own {found.model.item():.4f}"
    )
    frame = found.to_dataframe()
    assert list(frame.part) == list(found.parts)
    assert frame.logits.sum() + found.constant.item() == pytest.approx(found.model.item(), abs=1e-4)
    assert found.parts[-1] == "rest"
    top = found.top(3)
    largest = found.by_head.flatten().abs().argmax().item()
    assert (top.parts[0], len(top.parts)) == (f"L{largest // 8}H{largest % 8}", 3)
    assert top.attribution[0] == found.by_head.flatten()[largest]
    assert len(found.top(1000).parts) == 40
    assert "rest" not in found.top(1000).parts
    assert torch.equal(top.gap, found.gap)
    several = direct_logit_attribution(embedded, TEXTS, [",", "\n"], ["\n", ","])
    start = (
        "direct attribution of the logit of each row's answer less that of each row's incorrect token to each component"
    )
    assert several.title.startswith(f"{start}: sum ")
    assert several.title.endswith("; mean over 2 rows")
    assert torch.equal(several.attribution, several.per_row.mean(0))
    assert list(several.to_dataframe()) == ["part", "logits", "standard error"]


def test_the_title_says_what_comes_after():
    found = direct_logit_attribution(clearspan.boot(build("gemma2")), torch.tensor([[1, 2]]), 3)
    assert found.cap == 30
    assert found.title.startswith("direct attribution of the logit of #3 to each component, before the cap at 30: sum ")


def test_it_plots(embedded):
    heads = direct_logit_attribution(embedded, TEXTS[0], ",", unit="head")
    assert torch.tensor(heads.plot().data[0].z).allclose(heads.by_head, atol=1e-4)
    assert list(heads.top(4).plot().data[0].x) == list(heads.top(4).parts)
    parts = direct_logit_attribution(embedded, TEXTS[0], ",")
    assert list(parts.plot().data[0].x) == list(parts.parts)
    assert list(parts.plot().data[0].y) == pytest.approx(parts.attribution.tolist())
    neurons = direct_logit_attribution(embedded, TEXTS[0], ",", unit="neuron")
    assert list(neurons.plot().data[0].x) == list(neurons.top(40).parts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unit": "token"}, "unknown unit 'token'\n  expected: 'component', 'layer', 'head' or 'neuron'"),
        ({"pos": 9}, "row 0 has no position 9\n  expected: -3 to 2\n  got: 3 real tokens"),
        ({"pos": [0, 1]}, "one position of each row is read\n  expected: pos=-1, or another\n  got: [0, 1]"),
        (
            {"answer_tokens": torch.tensor([4, 5, 6])},
            "answer_tokens are one token for each row\n  expected: 2 tokens, ids from 0 to 4095\n  got: 3: [4, 5, 6]",
        ),
        (
            {"incorrect_tokens": 4096},
            "incorrect_tokens are one token for each row\n  expected: 2 tokens, ids from 0 to 4095\n  got: 1: [4096]",
        ),
    ],
)
def test_what_cannot_be_attributed_is_said(embedded, given, message):
    arguments = {"answer_tokens": 5, **given}
    with pytest.raises(InvalidArgumentError) as error:
        direct_logit_attribution(embedded, torch.tensor([[1, 2, 3], [4, 5, 6]]), **arguments)
    assert str(error.value) == message


def test_answers_are_single_tokens(embedded):
    with pytest.raises(InputError, match="'import os' is not a single token"):
        direct_logit_attribution(embedded, TEXTS[0], "import os")


def test_heads_are_asked_for(embedded):
    with pytest.raises(InvalidArgumentError) as error:
        _ = direct_logit_attribution(embedded, TEXTS[0], ",").by_head
    assert str(error.value) == (
        "this is not divided into heads\n  got: unit='component'\n  fix: direct_logit_attribution(unit='head')"
    )


@pytest.mark.parametrize(("variant", "layer"), [("mixtral", 0), ("deepseek_v3", 1)])
def test_mixtures_have_no_neurons(variant, layer, rows):
    with pytest.raises(InvalidArgumentError) as error:
        direct_logit_attribution(clearspan.boot(build(variant)), rows, 3, unit="neuron")
    lines = str(error.value).splitlines()
    assert lines[0] == f"layer {layer} has no neurons to attribute to"
    assert lines[2:] == [
        "  reason: the experts run side by side in one module, each on the tokens that chose it",
        "  fix: unit='layer', which takes its MLP as a whole",
    ]


@pytest.mark.parametrize("variant", ["opt post-norm", "bloom normed residual"])
@pytest.mark.parametrize("unit", UNITS)
def test_streams_that_are_no_sum_raise(variant, unit, rows):
    with pytest.raises(InvalidArgumentError, match="the residual stream of this model is not the sum"):
        direct_logit_attribution(clearspan.boot(build(variant)), rows, 3, unit=unit)
