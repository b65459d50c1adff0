"""Ablation against plain forwards with hooks that are written here, each row alone and without its padding."""

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.analysis import ablate_heads, ablate_layers, ablate_neurons
from clearspan.errors import AbsentPointError, InvalidArgumentError, UnknownPointError
from clearspan.interventions import derangement
from clearspan.sweep import LogitDifference, NextTokenLoss

VARIANTS = ["gpt_bigcode", "llama", "gemma2", "mixtral", "bloom"]
LAST = LogitDifference(3)


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
def mask(random_bridge):
    """Padding on either side, and a hole; a sliding window counts the columns of a hole, so Gemma 2 has none."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = mask[2, 4:] = 0
    mask[1, 3] = int(random_bridge.cfg.architecture == "Gemma2ForCausalLM")
    return mask


def alone(bridge, tokens, mask, hooks=(), **kwargs):
    """Runs each row alone and without its padding; hooks see that row."""
    for row, real in zip(tokens, mask.bool(), strict=True):
        yield bridge.run_with_hooks(row[real][None], fwd_hooks=hooks, **kwargs)


def losses(*args):
    return torch.stack(list(alone(*args, return_type="loss")))


@torch.no_grad()
def test_zeroed_heads_and_parts_are_whole_runs_with_a_hook_on_rows_alone(random_bridge, rows, mask):
    bridge = random_bridge
    clean = losses(bridge, rows, mask)
    heads = ablate_heads(bridge, rows, attention_mask=mask)
    parts = ablate_layers(bridge, rows, attention_mask=mask)
    assert heads.axes == {"layer": tuple(range(bridge.cfg.n_layers)), "head": tuple(range(bridge.cfg.n_heads))}
    # Losses of size 100 and more, padded and alone, in float32.
    close = {"rtol": 1e-4, "atol": 2e-3}
    torch.testing.assert_close(heads.base["next-token loss"], clean, **close)
    for layer in range(bridge.cfg.n_layers):
        for head in range(bridge.cfg.n_heads):

            def zero(z, hook, head=head):
                z[:, :, head] = 0

            expected = losses(bridge, rows, mask, [(f"blocks.{layer}.attn.hook_z", zero)])
            torch.testing.assert_close(heads.of()[layer, head], expected, **close)
        for part in ("attn", "mlp"):
            hook = (f"blocks.{layer}.hook_{part}_out", lambda value, hook: torch.zeros_like(value))
            expected = losses(bridge, rows, mask, [hook])
            torch.testing.assert_close(parts.select(layer=layer, part=part).of(), expected, **close)
    assert heads.change().mean(-1).abs().min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("given", ["a mask", "rows of several lengths", "a run"])
def test_means_are_over_the_references_real_positions(random_bridge, rows, others, mask, given):
    bridge, name = random_bridge, "blocks.1.attn.hook_z"
    real = [row[kept] for row, kept in zip(others, mask.bool(), strict=True)]
    reference = {"reference": others, "reference_mask": mask}
    if given == "rows of several lengths":
        reference = {"reference": [row.tolist() for row in real]}
    if given == "a run":
        reference = {"reference": bridge.to_batch(others, mask)}
    found = ablate_heads(bridge, rows, LAST, layers=1, method="mean", attention_mask=mask, **reference)
    mean = torch.cat([bridge.run_with_cache(row[None], names_filter=name)[1][name][0] for row in real]).mean(0)
    for head in range(bridge.cfg.n_heads):

        def write(z, hook, head=head):
            z[:, :, head] = mean[head]

        expected = torch.stack([logits[0, -1, 3] for logits in alone(bridge, rows, mask, [(name, write)])])
        # Logits of size 10 to 100, means of rows padded and alone, in float32.
        torch.testing.assert_close(found.of()[0, head], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_without_a_reference_the_mean_is_the_inputs(random_bridge, rows, mask):
    own = ablate_layers(random_bridge, rows, method="mean", attention_mask=mask)
    told = ablate_layers(random_bridge, rows, method="mean", attention_mask=mask, reference=rows, reference_mask=mask)
    assert torch.equal(own.of(), told.of())
    bare = ablate_layers(random_bridge, rows, method="mean", attention_mask=mask, reference=rows)  # padded as the input
    assert torch.equal(own.of(), bare.of())


@torch.no_grad()
@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("is_padded", [True, False])
def test_resampling_takes_another_row_at_the_same_position(random_bridge, rows, others, has_reference, is_padded):
    bridge, seed = random_bridge, 3
    mask = torch.ones(3, 6, dtype=torch.long)
    if is_padded:  # four real tokens in each row, in other columns
        mask[0, :2] = mask[1, 4:] = mask[2, 0] = 0
        mask[2, 1 if bridge.cfg.architecture == "Gemma2ForCausalLM" else 3] = 0
    reference = {"reference": others[:, :4] if is_padded else others} if has_reference else {}
    found = ablate_layers(bridge, rows, LAST, method="resample", seed=seed, attention_mask=mask, **reference)
    values = list(reference.values()) or [torch.stack([row[kept] for row, kept in zip(rows, mask.bool(), strict=True)])]
    _, cache = bridge.run_with_cache(values[0])
    order = derangement(3, seed)
    for layer in range(bridge.cfg.n_layers):
        for part in ("attn", "mlp"):
            name = f"blocks.{layer}.hook_{part}_out"
            for row, other in enumerate(order.tolist()):
                hook = (name, lambda value, hook, name=name, other=other: cache[name][other][None])
                logits = bridge.run_with_hooks(rows[row][mask[row].bool()][None], fwd_hooks=[hook])
                one = found.select(layer=layer, part=part).of()[row]
                torch.testing.assert_close(one, logits[0, -1, 3], rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "gemma2"])
def test_neurons_are_runs_with_a_hook(variant, rows):
    bridge = clearspan.boot(build(variant))
    found = ablate_neurons(bridge, rows, layer=-1, neurons=[4, 70])
    every = ablate_neurons(bridge, rows, layer=2)
    width = bridge.hook_dict["blocks.2.mlp.hook_post"].sizes["d_mlp"]
    assert every.mean().shape == (width,)
    for place, neuron in enumerate([4, 70]):

        def zero(post, hook, neuron=neuron):
            post[..., neuron] = 0

        hooks = [("blocks.2.mlp.hook_post", zero)]
        run = bridge.run_with_hooks(rows, fwd_hooks=hooks, return_type="loss", loss_per_token=True).mean(-1)
        torch.testing.assert_close(found.of()[place], run, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(every.of()[neuron], run, rtol=1e-4, atol=1e-3)
    last = ablate_neurons(bridge, rows, layer=2, neurons=-1)
    assert torch.equal(last.of()[0], ablate_neurons(bridge, rows, layer=2, neurons=width - 1).of()[0])


def test_what_comes_before_the_unit_is_not_run(embedded, tokens):
    ablate_layers(embedded, tokens, layers=[3])  # the first time it is tried how the model can be run
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(embedded.hf_model.transformer.h)
    ]
    ablate_layers(embedded, tokens, layers=[3])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3, 4, 3, 4]


def test_metrics_of_any_kind(embedded, tokens):
    found = ablate_layers(embedded, tokens, lambda logits: logits.mean(), layers=[0])
    assert found.of().shape == (1, 2, 1)
    likeliest = embedded(tokens)[:, -1].argmax(-1)
    both = {"answered": lambda logits: logits[:, -1].argmax(-1) == likeliest, "loss": NextTokenLoss()}
    found = ablate_layers(embedded, tokens, both)
    assert (found.base["answered"] == 1).all()
    assert set(found.of("answered").flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(found.of("loss"), ablate_layers(embedded, tokens).of())


def test_what_a_model_in_float64_is_measured_by_stays_so(rows):
    bridge = clearspan.boot(build("gpt2").double())
    found = ablate_heads(bridge, rows, layers=[1])
    assert found.of().dtype == torch.float64
    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z.index_fill(2, torch.tensor([2]), 0))]):
        written = bridge(rows, return_type="loss", loss_per_token=True).mean(-1)
    assert (found.of()[0, 2] - written).abs().max() < 1e-10


def test_it_says_what_was_done(embedded):
    heads = ablate_heads(embedded, "import os, sys", layers=[-1, 0], method="mean")
    assert heads.axes == {"layer": (4, 0), "head": tuple(range(8))}
    without = heads.base["next-token loss"].item()
    assert heads.title == f"next-token loss in nats with one head replaced by its mean; {without:.4f} without"
    first = str(heads).splitlines()[2].split()
    strongest = int(heads.change()[..., 0].abs().argmax())
    assert [int(place) for place in first[:2]] == [[4, 0][strongest // 8], strongest % 8]
    assert list(heads.plot().data[0].y) == ["4", "0"]
    neurons = ablate_neurons(embedded, ["import os", "import re"], LAST, layer=0, neurons=[9, 8], method="resample")
    assert neurons.title.startswith("logit_difference in logits with one neuron taken from another row; ")
    assert neurons.title.endswith(" without; mean over 2 rows")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "noise"}, "unknown method 'noise'\n  expected: 'zero', 'mean' or 'resample'"),
        ({"method": ["zero"]}, "unknown method ['zero']\n  expected: 'zero', 'mean' or 'resample'"),
        ({"layers": []}, "there is no layer to read\n  expected: layers=None for all\n  got: none"),
        ({"layers": "a"}, "layers='a'\n  expected: a whole number, or several"),
        ({"layers": 1.5}, "layers=1.5\n  expected: a whole number, or several"),
        ({"method": "resample", "seed": "a"}, "seed='a'\n  expected: a whole number, seed >= 0"),
        ({"progress": "a"}, "progress='a' shows nothing\n  expected: True, False, or a function called as "),
        ({"metric": 3}, "a sweep measures a metric\n  expected: "),
        ({"metric": {}}, "a sweep measures a metric\n  expected: "),
        (
            {"metric": lambda logits: logits[0, 0]},
            "the metric is not a number for each row\n  expected: a tensor [batch=2], or of no axes\n  got: [4096]",
        ),
        (
            {"attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]])},
            "there is no next token to predict\n"
            "  expected: two real tokens or more in each row\n  got: row 0 has fewer",
        ),
        (
            {"method": "resample", "reference": torch.tensor([[1, 2], [3, 4]])},
            "the source run 'reference' does not fit the run that is changed\n"
            "  expected: 2 rows (or one) of 3 positions\n  got: 2 rows of [2] positions",
        ),
        (
            {"reference_mask": torch.ones(2, 3)},
            "a reference_mask is given, and no reference\n  fix: attention_mask, for the input's",
        ),
        (
            {"method": "resample", "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
            "resample takes values at the same position\n  expected: rows of one length\n"
            "  got: rows of [2, 3] real tokens",
        ),
        (
            {"method": "resample", "reference": torch.tensor([[1, 2, 3]])},
            "resampling takes the values of another row\n  expected: two rows or more",
        ),
    ],
)
def test_what_cannot_be_ablated_is_said(embedded, given, message):
    for ablate in (ablate_heads, ablate_layers):
        with pytest.raises(InvalidArgumentError) as error:
            ablate(embedded, torch.tensor([[1, 2, 3], [4, 5, 6]]), **given)
        assert str(error.value).startswith(message)


def test_a_reference_of_bare_ids_that_hides_its_padding_raises(embedded):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(InvalidArgumentError, match="do not tell which of them are padding"):
        ablate_heads(
            embedded,
            torch.tensor([[1, 2, 3], [4, 5, 6]]),
            attention_mask=mask,
            method="mean",
            reference=torch.tensor([[7, 8, 9]] * 2),
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"neurons": [1024]}, "no 1024 among the neurons of blocks.0.mlp.hook_post\n  expected: -1024 to 1023"),
        ({"neurons": []}, "a grid cannot have the axis neuron=[]"),
        ({"neurons": "a"}, "neurons='a'\n  expected: a whole number, or several"),
        ({"layer": 5}, "there is no layer 5\n  expected: -5 to 4"),
        ({"layer": [0, 1]}, "layer=[0, 1] is no layer\n  expected: a whole number, or None"),
    ],
)
def test_neurons_that_do_not_exist_raise(embedded, tokens, given, message):
    with pytest.raises(InvalidArgumentError) as error:
        ablate_neurons(embedded, tokens, **{"layer": 0, "neurons": [1], **given})
    assert str(error.value).startswith(message)


def test_points_and_layers_that_are_not_there_raise(embedded, tokens):
    with pytest.raises(AbsentPointError):
        ablate_neurons(clearspan.boot(build("mixtral")), tokens, layer=0)
    for ablate in (ablate_heads, ablate_layers):
        with pytest.raises(UnknownPointError, match="expected: a layer from 0 to 4\n  got: layer 5"):
            ablate(embedded, tokens, layers=[0, 5])


def test_other_hooks_on_the_model_and_training_mode_are_refused(embedded, tokens):
    with (
        embedded.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: None)]),
        pytest.raises(InvalidArgumentError, match="hooks are on the model"),
    ):
        ablate_heads(embedded, tokens, layers=[2])
    training = clearspan.boot(build("llama").train())
    with pytest.raises(InvalidArgumentError, match="in evaluation mode"):
        ablate_heads(training, torch.tensor([[1, 2, 3]]))
