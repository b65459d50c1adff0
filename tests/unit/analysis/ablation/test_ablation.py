import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import ablate_heads, ablate_layers, ablate_neurons, next_token_loss
from clearspan.errors import AbsentPointError, InvalidArgumentError
from clearspan.interventions import derangement

VARIANTS = ["gpt_bigcode", "llama", "gemma2", "mixtral", "opt post-norm", "bloom", "gpt_neox"]


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param))


@pytest.fixture
def rows():
    return torch.randint(1, 97, (3, 6), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def others():
    return torch.randint(1, 97, (3, 6), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def mask():
    """Padding on either side."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = mask[2, 4:] = 0
    return mask


def losses(bridge, tokens, mask, hooks=()):
    """Each row's mean loss, run alone and without its padding; hooks see that row."""
    found = []
    for row, real in zip(tokens, mask.bool(), strict=True):
        found.append(bridge.run_with_hooks(row[real][None], fwd_hooks=hooks, return_type="loss"))
    return torch.stack(found)


@torch.no_grad()
def test_zeroed_heads_and_parts_are_whole_runs_with_a_hook_on_rows_alone(random_bridge, rows, mask):
    bridge = random_bridge
    clean = losses(bridge, rows, mask)
    heads = ablate_heads(bridge, rows, attention_mask=mask)
    parts = ablate_layers(bridge, rows, attention_mask=mask)
    assert heads.per_row.shape == (3, bridge.cfg.n_layers, bridge.cfg.n_heads)
    # Losses of size 100 and more, padded and alone, in float32.
    close = {"rtol": 1e-4, "atol": 2e-3}
    torch.testing.assert_close(heads.clean, clean, **close)
    for layer in range(bridge.cfg.n_layers):
        for head in range(bridge.cfg.n_heads):

            def zero(z, hook, head=head):
                z[:, :, head] = 0

            expected = losses(bridge, rows, mask, [(f"blocks.{layer}.attn.hook_z", zero)]) - clean
            torch.testing.assert_close(heads.per_row[:, layer, head], expected, **close)
        for number, part in enumerate(["attn", "mlp"]):
            hook = (f"blocks.{layer}.hook_{part}_out", lambda value, hook: torch.zeros_like(value))
            expected = losses(bridge, rows, mask, [hook]) - clean
            torch.testing.assert_close(parts.per_row[:, layer, number], expected, **close)
    torch.testing.assert_close(heads.change, heads.per_row.mean(0))
    assert heads.change.abs().min() > 1e-4


@torch.no_grad()
def test_means_are_over_the_references_real_positions(random_bridge, rows, others, mask):
    bridge, name = random_bridge, "blocks.1.attn.hook_z"
    found = ablate_heads(
        bridge, rows, lambda logits: logits[:, -1, 3], layers=[1], method="mean", reference=others, reference_mask=mask
    )
    real = []
    for row, kept in zip(others, mask.bool(), strict=True):
        real.append(bridge.run_with_cache(row[kept][None], names_filter=name)[1][name][0])
    mean = torch.cat(real).mean(0)
    clean = bridge(rows)[:, -1, 3]
    for head in range(bridge.cfg.n_heads):

        def write(z, hook, head=head):
            z[:, :, head] = mean[head]

        expected = bridge.run_with_hooks(rows, fwd_hooks=[(name, write)])[:, -1, 3] - clean
        # Logits of size 10 to 100, means of rows padded and alone, in float32.
        torch.testing.assert_close(found.per_row[:, 0, head], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("has_reference", [True, False])
def test_resampling_takes_another_row_at_the_same_position(random_bridge, rows, others, has_reference):
    bridge, seed = random_bridge, 3
    reference = others if has_reference else rows
    order = derangement(3, seed)
    metric = {"metric": lambda logits: logits[:, -1, 3], "method": "resample", "seed": seed}
    metric["reference"] = others if has_reference else None
    parts = ablate_layers(bridge, rows, **metric)
    _, cache = bridge.run_with_cache(reference)
    clean = bridge(rows)[:, -1, 3]
    for layer in range(bridge.cfg.n_layers):
        for number, part in enumerate(["attn", "mlp"]):
            name = f"blocks.{layer}.hook_{part}_out"
            hook = (name, lambda value, hook, name=name: cache[name][order])
            expected = bridge.run_with_hooks(rows, fwd_hooks=[hook])[:, -1, 3] - clean
            torch.testing.assert_close(parts.per_row[:, layer, number], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama", "gemma2"])
def test_neurons_are_runs_with_a_hook(variant, rows):
    bridge = clearspan.boot(build(variant))
    found = ablate_neurons(bridge, rows, layer=2, neurons=[4, 70])
    every = ablate_neurons(bridge, rows, layer=2)
    clean = bridge(rows, return_type="loss", loss_per_token=True).mean(-1)
    width = bridge.hook_dict["blocks.2.mlp.hook_post"].sizes["d_mlp"]
    assert every.change.shape == (width,)
    for place, neuron in enumerate([4, 70]):

        def zero(post, hook, neuron=neuron):
            post[..., neuron] = 0

        hooks = [("blocks.2.mlp.hook_post", zero)]
        run = bridge.run_with_hooks(rows, fwd_hooks=hooks, return_type="loss", loss_per_token=True)
        torch.testing.assert_close(found.per_row[:, place], run.mean(-1) - clean, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(every.per_row[:, neuron], found.per_row[:, place], rtol=1e-4, atol=1e-4)


def test_what_comes_before_the_unit_is_not_run(embedded, tokens):
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(embedded.hf_model.transformer.h)
    ]
    ablate_layers(embedded, tokens, layers=[3])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3, 4, 3, 4]


def test_a_metric_of_one_number_has_one_row(embedded, tokens):
    found = ablate_layers(embedded, tokens, lambda logits: logits.mean(), layers=[0])
    assert found.per_row.shape == (1, 1, 2)
    assert found.title.startswith("change of the metric with one part set to zero; ")


def test_what_a_model_in_float64_is_measured_by_stays_so(rows):
    bridge = clearspan.boot(build("gpt2").double())
    found = ablate_heads(bridge, rows, layers=[1])
    assert found.per_row.dtype == torch.float64
    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z.index_fill(2, torch.tensor([2]), 0))]):
        written = next_token_loss(rows)(bridge(rows))
    assert (found.per_row[:, 0, 2] - (written - next_token_loss(rows)(bridge(rows)))).abs().max() < 1e-10


def test_an_answer_is_a_metric_too(embedded, tokens):
    """Whether the likeliest token stays the likeliest: booleans are numbers, 1 and 0."""
    likeliest = embedded(tokens)[:, -1].argmax(-1)
    found = ablate_layers(embedded, tokens, lambda logits: logits[:, -1].argmax(-1) == likeliest)
    assert (found.clean == 1).all()
    assert set(found.per_row.flatten().tolist()) == {-1.0, 0.0}


def test_padded_texts_are_each_alone(embedded):
    texts = ["import os, sys", "def f(self, x):\n    return x"]
    both = ablate_layers(embedded, texts)
    for row, text in enumerate(texts):
        alone = ablate_layers(embedded, text)
        torch.testing.assert_close(both.per_row[row], alone.per_row[0], rtol=1e-4, atol=1e-4)


def test_it_prints_and_plots(embedded):
    heads = ablate_heads(embedded, "import os, sys", layers=[4, 0], method="mean")
    assert heads.axes == {"layer": (4, 0), "head": tuple(range(8))}
    assert heads.title == (
        "change of next-token loss in nats with one head replaced by its mean; "
        f"{heads.clean.item():.4f} in the clean run; mean over 1 row"
    )
    first = str(heads).splitlines()[2].split()
    strongest = int(heads.change.abs().argmax())
    assert [int(place) for place in first[:2]] == [[4, 0][strongest // 8], strongest % 8]
    assert list(heads.plot().data[0].y) == ["4", "0"]
    neurons = ablate_neurons(embedded, "import os, sys", layer=0, neurons=[9, 8])
    assert list(neurons.plot().data[0].x) == ["9", "8"]
    assert list(neurons.plot().data[0].y) == pytest.approx(neurons.change.tolist())


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_derangement_keeps_nothing_in_place_and_follows_the_seed(size):
    for seed in range(20):
        order = derangement(size, seed)
        assert sorted(order.tolist()) == list(range(size))
        assert not (order == torch.arange(size)).any()
        assert torch.equal(order, derangement(size, seed))
    assert size == 2 or len({tuple(derangement(size, seed).tolist()) for seed in range(20)}) > 1


PADDED = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "noise"}, "unknown method 'noise'\n  expected: 'zero', 'mean' or 'resample'"),
        ({"layers": [5]}, "there is no layer 5\n  expected: 0 to 4\n  got: 5"),
        ({"layers": []}, "there is no layer to ablate\n  expected: layers=None for all\n  got: none"),
        (
            {"metric": lambda logits: logits[0, 0]},
            "the metric is not a number for each row\n  expected: a tensor [batch=2], or of no axes\n  got: [4096]",
        ),
        (
            {"metric": lambda logits: 0.5},
            "the metric is not a number for each row\n  expected: a tensor [batch=2], or of no axes\n  got: float",
        ),
        (
            {"attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]])},
            "there is no next token to predict\n  expected: two real tokens or more in each row\n  got: fewer",
        ),
        (
            {"method": "resample", "reference": torch.tensor([[1, 2]])},
            "method='resample' takes each row's replacement from the reference at the same position\n"
            "  expected: a reference of the input's shape [2, 3]\n  got: [1, 2]",
        ),
        (
            {"reference_mask": torch.ones(2, 3)},
            "a reference_mask is given, and no reference\n  fix: attention_mask, for the input's",
        ),
        (
            {"method": "resample", **PADDED},
            "method='resample' takes the value at the same position\n  expected: rows of one length\n"
            "  got: rows with padding\n  fix: method='mean'",
        ),
    ],
)
def test_what_cannot_be_ablated_is_said(embedded, given, message):
    with pytest.raises(InvalidArgumentError) as error:
        ablate_heads(embedded, torch.tensor([[1, 2, 3], [4, 5, 6]]), **given)
    assert str(error.value) == message


def test_one_row_cannot_be_resampled(embedded):
    with pytest.raises(InvalidArgumentError) as error:
        ablate_layers(embedded, torch.tensor([[1, 2, 3]]), method="resample")
    assert str(error.value) == (
        "method='resample' takes the values of another row\n  expected: two rows or more\n  got: one"
    )


def test_neurons_that_do_not_exist_raise(embedded, tokens):
    with pytest.raises(InvalidArgumentError, match="there is no neuron 1024\n  expected: 0 to 1023"):
        ablate_neurons(embedded, tokens, layer=0, neurons=[1024])
    with pytest.raises(AbsentPointError):
        ablate_neurons(clearspan.boot(build("mixtral")), tokens, layer=0)


def test_other_hooks_on_the_model_are_refused(embedded, tokens):
    with (
        embedded.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: None)]),
        pytest.raises(InvalidArgumentError, match="hooks are on the model"),
    ):
        ablate_heads(embedded, tokens, layers=[2])
