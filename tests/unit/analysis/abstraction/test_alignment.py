import itertools

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import tiny_model
from tests.unit.analysis.abstraction.interchange_pairs import answer_logits, random_basis, random_pairs, within
from tests.zoo import build
from torch.nn import functional

import clearspan
from clearspan.analysis import (
    Alignment,
    CausalModel,
    InterchangeExamples,
    InterchangeSite,
    draw_interchanges,
    fit_alignment,
    interchange_accuracy,
)
from clearspan.analysis.abstraction.alignment import _Runs
from clearspan.errors import InvalidArgumentError, NotFiniteError, PointNotReachedError

VARIANTS = ["gpt_bigcode", "llama", "gemma2", "mixtral"]
ANSWERS = (3, 11, 50, 70)
LEVELS = range(4)


@pytest.fixture(scope="module")
def codes():
    """Orthonormal columns: the first three carry `a`, the next three carry `b`, in directions of no neuron's own."""
    return torch.linalg.qr(torch.randn(48, 6, generator=torch.Generator().manual_seed(7))).Q


@pytest.fixture(scope="module")
def coded(codes):
    """A model that holds `a` and `b` of its last token in two subspaces of the stream, and answers `16 + 4 a + b`.

    Token `4 a + b` has the corner `a` of a simplex in one subspace and the corner `b` in the other. The blocks add a
    little of what random weights make.
    """
    model = build("llama")
    corners = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.eye(4)[:, :3]], dim=1)).Q[:, 1:]
    pairs = list(itertools.product(LEVELS, LEVELS))
    points = torch.stack([torch.cat([corners[a], corners[b]]) for a, b in pairs]) @ codes.T
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.1) if "proj" in name else parameter.fill_(1.0)
        model.get_input_embeddings().weight.zero_()[:16] = 8 * points
        model.get_output_embeddings().weight.zero_()[16:32] = points
    return clearspan.boot(model)


@pytest.fixture(scope="module")
def examples(coded):
    """Pairs in which `a` comes from the source and `b` from the base, both in the last of three tokens."""
    model = CausalModel({"answer": lambda a, b: 16 + 4 * a + b}, output="answer")
    settings = itertools.product(LEVELS, LEVELS, range(3))
    inputs = [{"a": a, "b": b, "before": [filler, (filler + a * b) % 16]} for a, b, filler in settings]
    return draw_interchanges(
        coded, model, inputs, "a", prompt=lambda given: [*given["before"], 4 * given["a"] + given["b"]], count=300
    )


@pytest.fixture(scope="module")
def found(coded, examples):
    return fit_alignment(coded, examples, dimensions=3, layer=0, steps=60, learning_rate=0.2)


def test_the_model_does_as_it_was_made_to(coded, examples, codes):
    assert interchange_accuracy(coded, examples, layers=0, subspace=codes[:, :3]).accuracy == 1
    assert interchange_accuracy(coded, examples, layers=0, subspace=codes[:, 3:]).accuracy < 0.15


def test_it_finds_the_subspace_that_carries_the_variable(found, codes):
    assert found.accuracy > 0.97
    assert found.overlap(codes[:, :3]) > 0.9
    assert found.overlap(codes[:, 3:]) < 0.1
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(3))
    assert found.losses[-5:].mean() < 0.3 * found.losses[:5].mean()


def test_controls_do_not(found, examples):
    for control in ("random subspace", "random labels", "random labels, as shuffled", "nothing"):
        assert found.estimate(control).mean < 0.5, str(found)
    # Of the source's 16 answers, the expected one has the source's `a` and, in some 1 of 4 pairs, the base's `b` too.
    assert abs(found.estimate("whole vector").mean - 0.25) < 0.12
    assert found.hits["random subspace"].shape == (5, 75)
    assert found.hits["random labels, in training"].shape == (1, 225)


def test_what_is_said_of_held_out_pairs_is_what_they_do(coded, examples):
    others = fit_alignment(coded, examples, dimensions=3, layer=0, held_out=examples, steps=1, random_labels=0)
    assert others.hits["nothing"].shape == (1, 300)
    expected = interchange_accuracy(coded, examples, layers=0)
    assert torch.equal(others.hits["whole vector"], expected.hits)
    assert torch.equal(others.hits["nothing"][0], expected.unchanged)
    own = interchange_accuracy(coded, examples, layers=0, subspace=others.basis)
    assert torch.equal(others.hits["learned subspace"], own.hits)
    assert torch.equal(others.test(coded, examples).hits, own.hits)


def test_nothing_of_the_held_out_pairs_is_trained_on(coded, examples):
    training, others = examples.select(slice(0, 200)), examples.select(slice(200, 300))
    wrong = others.relabelled(others.labels.roll(1))
    fits = [
        fit_alignment(coded, training, dimensions=3, layer=0, held_out=part, steps=4)
        for part in (others, wrong, training.select(slice(0, 2)))
    ]
    for fit in fits[1:]:
        assert torch.equal(fit.basis, fits[0].basis)
        assert torch.equal(fit.losses, fits[0].losses)
        assert torch.equal(fit.hits["random labels, in training"], fits[0].hits["random labels, in training"])
    assert not torch.equal(fits[0].hits["whole vector"], fits[1].hits["whole vector"])


def test_a_share_that_is_held_out_is_in_neither_training_nor_its_figures(coded, examples):
    found = fit_alignment(coded, examples, dimensions=3, layer=0, held_out=0.4, steps=4, random_labels=0, seed=2)
    own = interchange_accuracy(coded, examples, layers=0, subspace=found.basis).hits[0]
    parts = torch.cat([found.hits["learned subspace"][0], found.hits["learned subspace, in training"][0]])
    assert (len(parts), found.hits["learned subspace"].shape[1]) == (300, 120)
    assert parts.sum() == own.sum()


def test_pairs_that_are_alike_are_in_one_part(coded, examples):
    twice = examples.select(torch.arange(12).repeat_interleave(5))
    found = fit_alignment(coded, twice, dimensions=3, layer=0, held_out=0.25, steps=1, random_labels=0)
    assert found.hits["nothing"].shape == (1, 15)
    assert found.hits["learned subspace, in training"].shape == (1, 45)
    held_out = found.hits["whole vector"].view(3, 5)
    assert (held_out == held_out[:, :1]).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_whole_runs_with_a_hook(variant, padded):
    """Rows alone, from the tokens; in float64, where transformers' own model runs so with padding."""
    dtype = torch.float32 if variant in ("gemma2", "mixtral") else torch.float64
    bridge, rel = clearspan.boot(build(variant).to(dtype)), 1e-7 if dtype == torch.float64 else 1e-4
    examples = random_pairs(padded=padded, answers=ANSWERS, hole=variant != "gemma2")
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.attn.hook_z", "hook_embed"):
        site = InterchangeSite.of(bridge, name)
        runs = _Runs.of(bridge, examples, site, batch_size=3)
        basis = random_basis(site.width, 4, dtype=dtype).requires_grad_()
        plain = functional.cross_entropy(answer_logits(bridge, examples, name, within(basis)), examples.targets())
        for rows in (torch.arange(5), torch.tensor([4, 2, 0, 1, 3])):
            loss = functional.cross_entropy(runs.logits(rows, basis), examples.targets()[rows])
            assert loss.item() == pytest.approx(plain.item(), rel=rel)
            ours, expected = (torch.autograd.grad(one, basis, retain_graph=True)[0] for one in (loss, plain))
            assert expected.norm() > 1e-3
            close = {"rtol": 10 * rel, "atol": 10 * rel * expected.abs().max().item()}
            torch.testing.assert_close(ours, expected, **close)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_on_any_architecture_and_leaves_it_as_it_was(variant):
    model = build(variant)
    for name in [name for name, _ in model.named_parameters()][::2]:
        model.get_parameter(name).requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    bridge, examples = clearspan.boot(model), random_pairs(rows=12, places=1, padded=True, answers=ANSWERS)
    with torch.no_grad():
        found = fit_alignment(
            bridge, examples, dimensions=12, layer=0, held_out=examples, steps=25, batch_size=12, learning_rate=0.3
        )
    assert found.losses[-1] < 0.95 * found.losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_steps_are_adams_on_the_orthonormal_factor():
    """The same three steps by plain torch, on whole runs from the tokens."""
    bridge = clearspan.boot(build("llama").double())
    examples, name = random_pairs(rows=6, places=1), "blocks.1.hook_resid_pre"
    found = fit_alignment(
        bridge,
        examples,
        dimensions=2,
        name=name,
        held_out=examples,
        steps=3,
        batch_size=6,
        learning_rate=0.2,
        random_labels=0,
        seed=4,
    )
    generator = torch.Generator().manual_seed(4)
    free = torch.randn(48, 2, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([free])
    for step, rate in enumerate((0.2, 0.2 * 2 / 3, 0.2 / 3)):
        basis, _ = torch.linalg.qr(free)
        logits = answer_logits(bridge, examples, name, within(basis))
        loss = functional.cross_entropy(logits, examples.labels)
        assert found.losses[step].item() == pytest.approx(loss.item(), rel=1e-5)
        (free.grad,) = torch.autograd.grad(loss, [free])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert found.overlap(torch.linalg.qr(free.detach()).Q.float()) == pytest.approx(1, abs=1e-5)


def test_it_is_the_seeds_and_leaves_torchs_own_alone(coded, examples):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (
        fit_alignment(coded, examples, dimensions=2, layer=1, steps=2, seed=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.basis, again.basis)
    assert all(torch.equal(first.hits[name], again.hits[name]) for name in first.hits)
    assert not torch.equal(first.basis, other.basis)


def test_it_trains_in_half_precision():
    bridge = clearspan.boot(build("llama").bfloat16())
    found = fit_alignment(bridge, random_pairs(rows=8), dimensions=3, layer=1, steps=2, batch_size=4, random_labels=0)
    assert found.basis.dtype == torch.float32
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(3))
    assert found.losses.isfinite().all()


def test_logits_that_are_no_numbers_raise():
    """Gemma 2 itself gives NaN in float64 for rows with padding on the left."""
    bridge = clearspan.boot(build("gemma2").double())
    with pytest.raises(NotFiniteError):
        fit_alignment(bridge, random_pairs(padded=True), dimensions=1, layer=0)


def test_the_whole_space_is_the_whole_vector(coded, examples):
    found = fit_alignment(coded, examples, dimensions=48, layer=0, steps=1, random_labels=0)
    assert torch.equal(found.hits["learned subspace"], found.hits["whole vector"])
    assert torch.equal(found.hits["random subspace"], found.hits["whole vector"].expand(5, -1))


def test_heads_and_neurons_are_the_space_that_is_searched():
    bridge, pairs = clearspan.boot(build("gpt_neox")), random_pairs(rows=8, answers=ANSWERS)
    chosen = {"name": "z", "layer": 1, "heads": [1, 2], "steps": 2, "random_labels": 0}
    found = fit_alignment(bridge, pairs, dimensions=3, held_out=pairs, **chosen)
    assert found.basis.shape == (24, 3)
    own = interchange_accuracy(bridge, pairs, name="z", layers=1, heads=[1, 2], subspace=found.basis)
    assert torch.equal(found.hits["learned subspace"], own.hits)
    assert torch.equal(found.test(bridge, pairs).hits, own.hits)
    some = fit_alignment(bridge, pairs, dimensions=2, layer=1, neurons=range(10), steps=1, random_labels=0)
    assert some.basis.shape == (10, 2)
    assert str(found.site) == "blocks.1.attn.hook_z (heads 1, 2)"


@torch.no_grad()
def test_it_is_an_intervention_of_any_run(coded, examples, found):
    part = examples.select(slice(0, 40))
    expected = interchange_accuracy(coded, part, layers=0, subspace=found.basis).hits[0]
    sources = {"other": part.source}
    for positions, read in ((2, None), (-1, -1), ([[2]] * 40, [[2]] * 40), ([2, 0], [2, 0])):
        swap = [found.intervention("other", positions, read)]
        answers = coded(part.base, interventions=swap, sources=sources)[:, -1].argmax(-1)
        assert torch.equal((answers == part.labels).float(), expected)
    swap = [found.intervention("other", positions=2)]
    settings = {"max_new_tokens": 3, "do_sample": False}
    made = coded.generate(part.base.ids, interventions=swap, sources=sources, **settings)
    assert torch.equal((made[:, 3] == part.labels).float(), expected)
    _, cache = coded.run_with_cache(part.source)
    values = cache[found.site.name]
    torch.testing.assert_close(found.project(values), values @ found.basis)
    # Values that were computed elsewhere, by the point's name.
    swap = [found.intervention("other", positions=2, source_position=0)]
    given = {"other": {found.site.name: values[:, 2:]}}
    answers = coded(part.base, interventions=swap, sources=given)[:, -1].argmax(-1)
    assert torch.equal((answers == part.labels).float(), expected)


def test_what_does_not_fit_raises(coded, examples, found):
    with pytest.raises(InvalidArgumentError) as raised:
        found.project(torch.zeros(2, 40))
    assert str(raised.value).splitlines() == [
        "these are no values of the point",
        "  expected: [..., 48]",
        "  got: [2, 40]",
        "  where: blocks.0.hook_resid_post",
    ]
    with pytest.raises(InvalidArgumentError, match="row 0 has no position 5\n  expected: -3 to 2"):
        coded(examples.base, interventions=[found.intervention(positions=5)], sources={"source": examples.source})
    with pytest.raises(InvalidArgumentError, match=r"expected: \[d=48, k\]"):
        found.overlap(torch.eye(40))
    for wrong in ("a", 1.5, []):
        with pytest.raises(InvalidArgumentError, match="position"):
            found.intervention(positions=wrong)
        with pytest.raises(InvalidArgumentError, match="position="):
            found.intervention(source_position=wrong)


def test_it_comes_back_from_a_file(tmp_path, coded, found):
    found.save(tmp_path / "found.safetensors")
    loaded = Alignment.load(tmp_path / "found.safetensors", coded)
    assert torch.equal(loaded.basis, found.basis)
    assert torch.equal(loaded.losses, found.losses)
    assert (loaded.site, loaded.model_name, str(loaded)) == (found.site, found.model_name, str(found))
    assert all(torch.equal(loaded.hits[name], found.hits[name]) for name in found.hits)
    heads = Alignment(
        InterchangeSite.of(coded, "blocks.1.attn.hook_z", [1]), torch.eye(12)[:, :2], torch.empty(0), {}, "m"
    )
    heads.save(tmp_path / "heads.safetensors")
    assert Alignment.load(tmp_path / "heads.safetensors", coded).site == heads.site


def test_a_file_for_another_model_and_a_file_that_is_none_raise(tmp_path, found):
    found.save(tmp_path / "found.safetensors")
    wide = clearspan.boot(tiny_model(n_embd=64))
    for attempt in (
        lambda: Alignment.load(tmp_path / "found.safetensors", wide),
        lambda: found.test(wide, random_pairs()),
    ):
        with pytest.raises(InvalidArgumentError) as raised:
            attempt()
        assert str(raised.value).splitlines() == [
            "the alignment in LlamaForCausalLM does not fit GPTBigCodeForCausalLM",
            "  expected: an alignment for values of shape [64] at each position",
            "  got: [48]",
            "  where: blocks.0.hook_resid_post",
            "  fix: fit_alignment(bridge, examples, ...)",
        ]
    save_file({"basis": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidArgumentError) as raised:
        Alignment.load(tmp_path / "other.safetensors", wide)
    assert str(raised.value).splitlines() == [
        "other.safetensors is no alignment",
        "  expected: a file written by Alignment.save, of format 'clearspan alignment 1'",
        "  got: format None",
    ]


def test_what_cannot_be_trained_raises(coded, examples):
    for wrong in ("dimensions", "steps", "batch_size"):
        for value in (0, 1.5, "a"):
            with pytest.raises(
                InvalidArgumentError, match=f"{wrong}={value!r}\n  expected: a whole number, {wrong} >= 1"
            ):
                fit_alignment(coded, examples, layer=0, **{"dimensions": 1, wrong: value})
    for wrong in ("random_subspaces", "random_labels", "seed"):
        with pytest.raises(InvalidArgumentError, match=f"{wrong}=-1\n  expected: a whole number, {wrong} >= 0"):
            fit_alignment(coded, examples, layer=0, dimensions=1, **{wrong: -1})
    for wrong, value in {"learning_rate": 0, "held_out": "a", "progress": "a", "layer": "a", "name": 3}.items():
        with pytest.raises(InvalidArgumentError, match=f"{value!r}"):
            fit_alignment(coded, examples, **{"layer": 0, "dimensions": 1, wrong: value})
    with pytest.raises(InvalidArgumentError, match="these are no InterchangeExamples"):
        fit_alignment(coded, ["import os"], dimensions=1, layer=0)
    with pytest.raises(PointNotReachedError):
        fit_alignment(coded, examples, dimensions=1, name="hook_logits", steps=1)
    with pytest.raises(InvalidArgumentError) as raised:
        fit_alignment(coded, examples, dimensions=13, name="z", layer=1, heads=2)
    assert str(raised.value).splitlines() == [
        "dimensions=13",
        "  expected: 1 to 12, the width of a value",
        "  where: blocks.1.attn.hook_z (heads 2)",
    ]
    with pytest.raises(InvalidArgumentError, match="'resid_post' is in 3 layers\n  fix: layer=0, or another"):
        fit_alignment(coded, examples, dimensions=1)
    for share, pairs in ((0.0, examples), (1.0, examples), (0.5, examples.select(slice(0, 1)))):
        with pytest.raises(InvalidArgumentError, match="leaves nothing for one of the parts"):
            fit_alignment(coded, pairs, dimensions=1, layer=0, held_out=share)


def test_a_result_is_a_table_with_controls(found):
    frame = found.to_dataframe().set_index("exchanged")
    assert frame.accuracy["learned subspace"] == pytest.approx(found.accuracy)
    assert frame.draws["random subspace"] == 5
    assert (frame.low <= frame.accuracy).all()
    assert (frame.accuracy <= frame.high).all()
    assert frame.low["learned subspace"] < 1
    estimate = found.estimate("random subspace")
    assert (estimate.mean, estimate.rows) == (pytest.approx(found.hits["random subspace"].mean().item()), 75)
    assert str(found).splitlines()[0] == (
        "alignment in LlamaForCausalLM: 3 of 48 dimensions at blocks.0.hook_resid_post; "
        "interchange accuracy on 75 held-out pairs"
    )
    assert list(found.plot().data[0].x) == list(found.hits)
    with pytest.raises(InvalidArgumentError, match="nothing is known of 'all'\n  expected: learned subspace"):
        found.estimate("all")


def test_progress(coded, examples):
    steps = []
    fit_alignment(coded, examples, dimensions=1, layer=2, steps=2, progress=lambda *step: steps.append(step))
    assert steps == [
        ("alignment", 1, 2),
        ("alignment", 2, 2),
        ("random labels 1 of 1", 1, 2),
        ("random labels 1 of 1", 2, 2),
    ]


def test_a_pair_of_other_tokens_can_be_asked_by_hand(coded):
    examples = InterchangeExamples.of(coded, [1, 5], [9], 16 + 9, position=1, source_position=0)
    assert interchange_accuracy(coded, examples, layers=0).accuracy == 1
