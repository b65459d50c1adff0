import pytest
import torch
from clearspan.analysis.abstraction.interchange_runs import InterchangeRuns
from clearspan.analysis.abstraction.interchange_site import InterchangeSite, whole, within
from tests.conftest import tiny_model
from tests.unit.analysis.abstraction.interchange_pairs import answer_logits, random_pairs
from tests.zoo import build

import clearspan
from clearspan.analysis import InterchangeExamples, interchange_accuracy, interchange_sweep
from clearspan.errors import InvalidArgumentError, PointNotReachedError, UnknownPointError
from clearspan.interventions import Intervention, Patch

VARIANTS = ["gpt_bigcode", "llama", "gemma2", "gpt_neox", "mixtral", "opt post-norm"]
NAMES = [
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_post",
    "blocks.2.hook_resid_post",
    "blocks.1.attn.hook_z",
    "blocks.0.attn.hook_k",
    "blocks.2.hook_mlp_out",
]
ANSWERS = (3, 11, 50, 70)


@pytest.fixture(scope="module", params=VARIANTS)
def random_bridge(request):
    return clearspan.boot(build(request.param))


def random_basis(width, dimensions, seed=0, dtype=torch.float32):
    free = torch.randn(width, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(free).Q.to(dtype)


def runs_at(bridge, examples, name, **parts):
    site = InterchangeSite.of(bridge, name, parts.get("heads"), parts.get("neurons"))
    return InterchangeRuns.of(bridge, examples, site, batch_size=2)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_runs_are_whole_runs_of_rows_alone_with_a_hook(random_bridge, padded):
    """Positions that differ by row, two places, padding on both sides, and a batch that is cut in three."""
    bridge, examples = random_bridge, random_pairs(padded=padded)
    for name in NAMES:
        runs = runs_at(bridge, examples, name)
        basis = random_basis(runs.source.shape[-1], 5)
        for exchange in (whole, within(basis)):

            def plain(base, source, exchange=exchange):
                return exchange(base.flatten(1), source.flatten(1)).view_as(base)

            expected = answer_logits(bridge, examples, name, plain)
            found = torch.cat([runs.select(slice(0, 2)).logits(exchange), runs.select(slice(2, 5)).logits(exchange)])
            # Logits of size 10 to 100 from random weights, padded and alone, in float32.
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)
            assert torch.equal(runs.hits(exchange, 2), (expected.argmax(-1) == examples.labels).float())


@torch.no_grad()
def test_the_whole_vector_is_a_patch(random_bridge):
    examples = random_pairs(places=1)
    tokens = examples.source[:, :6]
    aligned = InterchangeExamples(
        examples.base[:, 1:], tokens, examples.labels, torch.full((5, 1), 2), torch.full((5, 1), 2)
    )
    for point in ("resid_pre", "mlp_out"):
        name = f"blocks.1.hook_{point}"
        patch = Intervention(point, Patch("source"), layer=1, positions=2)
        expected = random_bridge.run_with_interventions(aligned.base, [patch], {"source": tokens})[:, -1]
        runs = runs_at(random_bridge, aligned, name)
        torch.testing.assert_close(runs.logits(whole), expected, rtol=1e-4, atol=1e-3)
        every = within(torch.eye(runs.source.shape[-1]))
        torch.testing.assert_close(runs.logits(every), expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_an_exchange_of_nothing_is_the_base(random_bridge):
    examples = random_pairs(padded=True)
    runs = runs_at(random_bridge, examples, "blocks.1.hook_resid_post")
    expected = answer_logits(random_bridge, examples, "blocks.1.hook_resid_post", lambda base, source: base)
    torch.testing.assert_close(runs.logits(within(torch.empty(48, 0))), expected, rtol=1e-4, atol=2e-3)
    assert torch.equal(runs.unchanged, (expected.argmax(-1) == examples.labels).float())
    itself = InterchangeExamples(
        examples.base, examples.base, examples.labels, *[examples.base_positions] * 2, None, *[examples.base_mask] * 2
    )
    own = runs_at(random_bridge, itself, "blocks.1.hook_resid_post")
    torch.testing.assert_close(own.logits(whole), expected, rtol=1e-4, atol=2e-3)
    # Their answers expected of them, all are right without an interchange.
    answered = InterchangeExamples(
        examples.base,
        examples.source,
        expected.argmax(-1),
        examples.base_positions,
        examples.source_positions,
        None,
        examples.base_mask,
        examples.source_mask,
    )
    assert interchange_accuracy(random_bridge, answered, layers=1).unchanged.tolist() == [1.0] * 5


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gpt_bigcode", "llama"])
def test_heads_neurons_and_subspaces_of_them(variant):
    bridge, examples = clearspan.boot(build(variant)), random_pairs()
    basis = random_basis(2 * 12, 3)

    def heads(base, source):
        return torch.stack([base[:, 0], source[:, 1], base[:, 2], source[:, 3]], dim=1)

    def neurons(base, source):
        found = base.clone()
        found[:, [4, 7]] = source[:, [4, 7]]
        return found

    def in_heads(base, source):
        chosen = (source - base)[:, [1, 3]].flatten(1)
        found = base.clone()
        found[:, [1, 3]] += (chosen @ basis @ basis.T).view(-1, 2, 12)
        return found

    for name, parts, exchange, plain in (
        ("blocks.1.attn.hook_z", {"heads": (1, 3)}, whole, heads),
        ("blocks.1.mlp.hook_post", {"neurons": [4, 7]}, whole, neurons),
        ("blocks.1.hook_resid_pre", {"neurons": [4, 7]}, whole, neurons),
        ("blocks.1.attn.hook_z", {"heads": [1, -1]}, within(basis), in_heads),
    ):
        expected = answer_logits(bridge, examples, name, plain)
        found = runs_at(bridge, examples, name, **parts).logits(exchange)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_accuracy_by_layer_among_all_tokens_and_among_answers(random_bridge):
    for answers in (None, ANSWERS):
        examples = random_pairs(rows=12, places=1, padded=True, answers=answers)
        among = torch.arange(97) if answers is None else torch.tensor(answers)
        found = interchange_accuracy(random_bridge, examples, name="mlp_out", batch_size=5)
        assert found.axes == {"layer": (0, 1, 2)}
        for layer in range(3):
            logits = answer_logits(random_bridge, examples, f"blocks.{layer}.hook_mlp_out", lambda base, source: source)
            assert torch.equal(found.hits[layer], (among[logits.argmax(-1)] == examples.labels).float())
    assert 0 < found.accuracy.mean() < 1


@torch.no_grad()
@pytest.mark.parametrize("point", ["resid_pre", "resid_post", "z"])
def test_a_sweep_is_an_interchange_at_each_layer_and_position(random_bridge, point):
    pairs = random_pairs(rows=8, answers=ANSWERS)
    base = pairs.base[:, :6]
    found = interchange_sweep(
        random_bridge,
        InterchangeExamples(base, pairs.source, pairs.labels, *[torch.zeros(8, 1, dtype=torch.long)] * 2, ANSWERS),
        name=point,
        positions=[0, 3, -1],
        batch_size=5,
    )
    assert found.axes == {"layer": (0, 1, 2), "position": (0, 3, -1)}
    for place, position in enumerate((0, 3, -1)):
        at = torch.full((8, 1), position)
        own = InterchangeExamples(base, pairs.source, pairs.labels, at, at, ANSWERS)
        alone = interchange_accuracy(random_bridge, own, name=point)
        assert torch.equal(found.hits[:, place], alone.hits)
        assert torch.equal(found.unchanged, alone.unchanged)
    assert 0 < found.accuracy.mean() < 1


@torch.no_grad()
def test_a_sweep_of_chosen_heads():
    bridge, pairs = clearspan.boot(build("llama")), random_pairs(rows=8, answers=ANSWERS)
    at = torch.full((8, 1), 5)
    examples = InterchangeExamples(pairs.base[:, :6], pairs.source, pairs.labels, at, at, ANSWERS)
    swept = interchange_sweep(bridge, examples, name="z", layers=-1, positions=[5], heads=[0, 2])
    alone = interchange_accuracy(bridge, examples, name="z", layers=2, heads=[0, 2])
    assert torch.equal(swept.hits[:, 0], alone.hits)
    assert not torch.equal(alone.hits, interchange_accuracy(bridge, examples, name="z", layers=2).hits)
    assert swept.title.startswith(
        "interchange accuracy: whole vectors of blocks.2.attn.hook_z (heads 0, 2) exchanged; "
    )


@torch.no_grad()
def test_points_outside_blocks_are_run_from_the_tokens(random_bridge):
    examples = random_pairs(padded=True)
    found = interchange_accuracy(random_bridge, examples, name="hook_embed")
    logits = answer_logits(random_bridge, examples, "hook_embed", lambda base, source: source)
    assert torch.equal(found.hits[0], (logits.argmax(-1) == examples.labels).float())
    assert found.axes == {"point": ("hook_embed",)}
    with pytest.raises(PointNotReachedError):
        interchange_accuracy(random_bridge, examples, name="hook_logits")


@torch.no_grad()
def test_layers_before_the_write_are_not_run_again(bridge):
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(bridge.hf_model.transformer.h)
    ]
    examples = random_pairs()
    interchange_accuracy(bridge, examples, layers=[1, 3])
    for handle in handles:
        handle.remove()
    bases, sources, changed = [0, 1, 2, 3, 4], [0, 1, 2, 3], [[2, 3, 4], [4]]
    assert ran == [*bases, *sources, *changed[0], *changed[1]]


@torch.no_grad()
def test_in_half_precision_whole_values_are_copied_exactly():
    bridge, examples = clearspan.boot(build("llama").bfloat16()), random_pairs(places=1)
    seen = {}
    name = "blocks.1.hook_mlp_out"
    runs = runs_at(bridge, examples, name)
    with bridge.hooks([(name, lambda value, hook: seen.update(value=value.clone()))]):
        runs.logits(whole)
    _, cache = bridge.run_with_cache(examples.source, names_filter=name)
    rows = torch.arange(5)
    taken = cache[name][rows, examples.source_columns[:, 0]]
    with (
        bridge.hooks(runs.site.hooks(runs.source, examples.base_columns, whole)),
        bridge.hooks([(name, lambda value, hook: seen.update(value=value.clone()))]),
    ):
        bridge(examples.base)
    assert torch.equal(seen["value"][rows, examples.base_columns[:, 0]], taken)


@torch.no_grad()
def test_a_subspace_is_exchanged_and_the_rest_is_left(bridge):
    examples = random_pairs(places=1)
    basis, name, seen = random_basis(256, 4), "blocks.2.hook_resid_mid", {}
    runs = runs_at(bridge, examples, name)
    hooks = runs.site.hooks(runs.source, examples.base_columns, within(basis))
    bridge.run_with_hooks(
        examples.base, fwd_hooks=[*hooks, (name, lambda value, hook: seen.update(value=value.clone()))]
    )
    _, base = bridge.run_with_cache(examples.base, names_filter=name)
    _, source = bridge.run_with_cache(examples.source, names_filter=name)
    rows, at, taken_at = torch.arange(5), examples.base_columns[:, 0], examples.source_columns[:, 0]
    new, old, taken = seen["value"][rows, at], base[name][rows, at], source[name][rows, taken_at]
    torch.testing.assert_close(new @ basis, taken @ basis, rtol=1e-4, atol=1e-4)
    rest = torch.eye(256) - basis @ basis.T
    torch.testing.assert_close(new @ rest, old @ rest, rtol=1e-4, atol=1e-4)
    elsewhere = torch.ones(5, 7, dtype=torch.bool).index_put((rows, at), torch.tensor(False))
    assert torch.equal(seen["value"][elsewhere], base[name][elsewhere])


def test_a_result_says_how_sure_it_is(bridge):
    examples = random_pairs(rows=20, places=1, answers=ANSWERS)
    found = interchange_accuracy(bridge, examples, layers=[0, 4], subspace=torch.eye(256)[:, :200])
    assert found.exchanged == "a subspace of 200 dimensions of hook_resid_post"
    spread = found.hits.std(1) / 20**0.5
    torch.testing.assert_close(found.standard_error, spread)
    interval = found.interval()
    assert (interval.low < found.accuracy).all()
    assert (found.accuracy < interval.high).all()
    frame = found.to_dataframe()
    assert list(frame) == ["layer", "accuracy", "low", "high"]
    assert frame.accuracy.tolist() == found.accuracy.tolist()
    assert [line.name for line in found.plot().data] == ["exchanged", "without"]
    assert str(found).splitlines()[0] == (
        f"interchange accuracy: a subspace of 200 dimensions of hook_resid_post exchanged; "
        f"{found.unchanged.mean():.4f} without an interchange; 20 pairs"
    )
    at = torch.zeros(20, 1, dtype=torch.long)
    swept = interchange_sweep(
        bridge, InterchangeExamples(examples.base[:, 1:], examples.source, examples.labels, at, at), layers=[0, 1]
    )
    assert swept.plot().data[0].z is not None
    assert list(swept.to_dataframe()) == ["layer", "position", "accuracy", "low", "high"]


def test_progress(bridge):
    steps = []
    interchange_accuracy(bridge, random_pairs(), layers=0, batch_size=2, progress=lambda *step: steps.append(step))
    assert steps == [("interchanges", 2, 5), ("interchanges", 4, 5), ("interchanges", 5, 5)]


def lines_of(raised):
    return str(raised.value).splitlines()


def test_what_does_not_fit_raises():
    bridge, pairs = clearspan.boot(tiny_model()), random_pairs()
    with pytest.raises(UnknownPointError):
        interchange_accuracy(bridge, pairs, name="resid")
    with pytest.raises(InvalidArgumentError) as raised:
        interchange_accuracy(bridge, pairs, subspace=torch.eye(40))
    assert lines_of(raised) == [
        "the subspace is of another space than the vectors",
        "  expected: [d=48, k]",
        "  got: [40, 40]",
        "  where: blocks.0.hook_resid_post",
    ]
    with pytest.raises(InvalidArgumentError) as raised:
        interchange_accuracy(bridge, pairs, subspace=2 * torch.eye(48))
    assert lines_of(raised) == [
        "the columns of the subspace's basis are not orthonormal",
        "  expected: basis.T @ basis = 1",
        "  got: another by 3",
        "  fix: torch.linalg.qr(basis).Q",
    ]
    with pytest.raises(InvalidArgumentError, match=r"no 4 among the heads of blocks\.0\.attn\.hook_z"):
        interchange_accuracy(bridge, pairs, name="z", heads=4)
    with pytest.raises(InvalidArgumentError, match="hook_resid_post has no heads"):
        interchange_accuracy(bridge, pairs, heads=0)
    with pytest.raises(InvalidArgumentError, match=r"hook_pattern is not a value at each position"):
        interchange_accuracy(bridge, pairs, name="pattern")
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        interchange_accuracy(bridge, pairs, batch_size=0)
    beyond = InterchangeExamples(
        pairs.base, pairs.source, torch.full((5,), 97), pairs.base_positions, pairs.source_positions
    )
    with pytest.raises(InvalidArgumentError, match="ids from 0 to 96"):
        interchange_accuracy(bridge, beyond)
    bridge.hf_model.train()
    with pytest.raises(InvalidArgumentError) as raised:
        interchange_accuracy(bridge, pairs)
    assert lines_of(raised) == [
        "interchanges are run on a model in evaluation mode",
        "  got: training mode",
        "  fix: bridge.hf_model.eval()",
    ]


def test_a_sweep_of_examples_that_are_not_aligned_raises():
    bridge = clearspan.boot(tiny_model())
    padded = random_pairs(padded=True)
    for examples, got in ((random_pairs(), "7 and 6 tokens"), (padded, "padding")):
        with pytest.raises(InvalidArgumentError) as raised:
            interchange_sweep(bridge, examples)
        assert lines_of(raised) == [
            "a sweep over positions exchanges values at the same position",
            "  expected: bases and sources of one length, without padding",
            f"  got: {got}",
            "  fix: interchange_accuracy, for positions that differ by pair",
        ]
