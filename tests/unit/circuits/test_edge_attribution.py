import pytest
import torch
from tests.unit.circuits.frozen import Parts, laid_alike, pair_of, reading, stream
from tests.zoo import CONTINUOUS, MODELS, build

import clearspan
from clearspan.circuits import (
    ComputationalGraph,
    Edge,
    Node,
    attribution_patch,
    edge_attribution,
    edge_scores,
    patch_edges,
    runs,
)
from clearspan.circuits.edge_scores import ReceiverGradients, graded_points, groups_of, streams_of_heads
from clearspan.circuits.graph import Wired
from clearspan.circuits.runs import PairRuns
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import KLDivergence, LogitDifference

WITHOUT = ["opt post-norm", "bloom normed residual", "deepseek_v3", "deepseek_v3 full queries"]
"""Streams that are no sum, and keys and values without inputs of their own."""
VARIANTS = [
    *("gpt_bigcode", "gpt_bigcode multi-head", "llama", "gemma2", "olmo2", "granite", "gpt_neox", "gptj", "bloom"),
    *("falcon grouped", "mixtral", "opt"),
]
"""Shared keys and values, norms on outputs, multipliers, parallel blocks with norms apart and shared, experts."""
METRIC = LogitDifference((3, 4), (5, 6))


def in_float64(variant):
    smooth = {"activation_function": "gelu"} if variant == "opt" else {}
    model = build(variant, **CONTINUOUS.get(variant, {}), **smooth).double()
    if variant in CONTINUOUS:  # the grouped kernel has no float64
        model.set_experts_implementation("eager")
    return clearspan.boot(model)


def ids(seed):
    return torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(seed))


CLEAN, CORRUPTED = ids(3), ids(4)


@pytest.fixture(scope="module", params=VARIANTS)
def bridge(request):
    return in_float64(request.param)


@pytest.fixture(scope="module")
def exact():
    return in_float64("llama")


@pytest.fixture(scope="module")
def found(exact):
    return edge_attribution(exact, CLEAN, CORRUPTED, METRIC)


def sampled(graph, count, seed=0):
    """Returns some edges, of each kind of receiver."""
    edges = list(graph.edges())
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed)).tolist()
    kinds = dict.fromkeys(("q", "k", "v", "mlp", "logits"), 0)
    for number in order:
        kind = edges[number].receiver.kind
        if kinds[kind] < count:
            kinds[kind] += 1
            yield edges[number]


def towards(ours, theirs, share):
    """Returns parts a share of the way from one run to another."""

    def between(one, other):
        return one + share * (other - one)

    z, mlp = (
        [between(*two) for two in zip(*pair, strict=True)] for pair in ((ours.z, theirs.z), (ours.mlp, theirs.mlp))
    )
    return Parts(between(ours.entering, theirs.entering), z, mlp)


# --- the graph -------------------------------------------------------------------------------------------------------


def test_an_edge_is_where_the_receiver_sees_the_sender(bridge):
    """What a sender adds is changed, and the streams that receivers read are looked at."""
    graph, mask = ComputationalGraph.of(bridge), ComputationalGraph.of(bridge).mask
    assert mask.shape == (len(graph.senders), len(graph.receivers))
    assert graph.n_edges == int(mask.sum()) == len(list(graph.edges()))
    streams = [graph.stream_of(receiver) for receiver in graph.receivers]
    with torch.no_grad():
        _, before = bridge.run_with_cache(CLEAN, list(dict.fromkeys(streams)))
        for place, sender in enumerate(graph.senders):
            name = {
                "embed": "blocks.0.hook_resid_pre",
                "head": f"blocks.{sender.layer}.hook_attn_out",
                "mlp": f"blocks.{sender.layer}.hook_mlp_out",
            }[sender.kind]
            if sender.kind == "embed":
                assert mask[place].all()
                continue
            with bridge.hooks([(name, lambda value, hook: value + 1)]):
                _, after = bridge.run_with_cache(CLEAN, list(dict.fromkeys(streams)))
            seen = torch.tensor([not torch.equal(before[stream], after[stream]) for stream in streams])
            assert torch.equal(mask[place], seen), sender


def test_heads_are_shared_evenly_or_there_are_none():
    with pytest.raises(InvalidArgumentError) as raised:
        ComputationalGraph(n_layers=2, n_heads=4, n_kv_heads=3)
    assert str(raised.value).startswith("n_heads=4, n_kv_heads=3\n  expected: n_heads a multiple of n_kv_heads")
    with pytest.raises(InvalidArgumentError, match="n_heads=0\n  expected: a whole number, n_heads >= 1"):
        ComputationalGraph(n_layers=2, n_heads=0, n_kv_heads=0)
    mixers = ComputationalGraph(2, 0, 0, wiring=((Wired("mixer", 0, 1),),) * 2)
    assert [node.name for node in mixers.senders] == ["embed", "L0.mixer", "L1.mixer"]


def test_names_are_stable_and_lead_back():
    graph = ComputationalGraph(n_layers=2, n_heads=4, n_kv_heads=2)
    assert [node.name for node in graph.senders[:7]] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0.mlp", "L1H0"]
    assert [node.name for node in graph.receivers if node.layer == 1] == [
        *("L1H0.q", "L1H1.q", "L1H2.q", "L1H3.q", "L1H0-1.k", "L1H2-3.k", "L1H0-1.v", "L1H2-3.v", "L1.mlp"),
    ]
    assert graph.receivers[-1].name == "logits"
    for node in (*graph.senders, *graph.receivers):
        assert graph.node(node.name) == node
    for edge in graph.edges():
        assert graph.edge(edge.name) == edge
    assert graph.edge("L0H1->L1H2-3.v") == Edge(Node("head", 0, (1,)), Node("v", 1, (2, 3)))
    assert [graph.node(name).place for name in ("L1H3.q", "L1H2-3.k", "L1.mlp")] == [3, 1, None]
    assert [node.name for node in graph.inputs_of(graph.node("L1H3"))] == ["L1H3.q", "L1H2-3.k", "L1H2-3.v"]
    assert graph.inputs_of(Node("mlp", 0)) == (Node("mlp", 0),)
    assert graph.inputs_of(Node("embed")) == ()
    assert [one.name for one in ComputationalGraph(1, 2, 2).attention_inputs(0)] == [
        f"L0H{head}.{kind}" for kind in "qkv" for head in range(2)
    ]


@pytest.mark.parametrize(
    ("graph", "name", "message"),
    [
        (
            ComputationalGraph(2, 2, 2),
            "L1H0->L0.mlp",
            "there is no edge 'L1H0->L0.mlp'\n  expected: a sender, and a receiver that comes after it",
        ),
        (
            ComputationalGraph(2, 2, 2, is_parallel=True),
            "L1H0->L1.mlp",
            "there is no edge 'L1H0->L1.mlp'\n  expected: a sender, and a receiver that comes after it\n"
            "  reason: attention and MLP of a block read the same stream",
        ),
        (ComputationalGraph(2, 2, 2), "L1H5->logits", "there is no node 'L1H5'\n  nearest: L1H1, L1H0, L1H1.v"),
    ],
)
def test_what_is_no_edge_is_said(graph, name, message):
    with pytest.raises(InvalidArgumentError) as error:
        graph.edge(name)
    assert str(error.value) == message


@pytest.mark.parametrize("variant", WITHOUT)
def test_models_without_a_graph_say_why(variant):
    bridge = clearspan.boot(build(variant))
    with pytest.raises(InvalidArgumentError) as error:
        edge_attribution(bridge, CLEAN, CORRUPTED, METRIC)
    no_sum = "the residual stream of this model is not the sum of what its parts write"
    no_input = "the graph of this model has no receiver at hook_k_input"
    assert str(error.value).splitlines()[0] == (no_input if variant.startswith("deepseek") else no_sum)
    assert "  reason: " in str(error.value)
    assert "  fix: attribution_patch" in str(error.value)


# --- gradients and changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [variant for variant in MODELS if variant not in WITHOUT])
def test_gradients_at_inputs_are_those_that_the_bridge_computes(variant):
    """On every architecture that has a graph, in float32."""
    bridge = clearspan.boot(build(variant))
    graph = ComputationalGraph.of(bridge)
    layers = range(bridge.cfg.n_layers)
    names = [f"blocks.{layer}.hook_{part}" for layer in layers for part in ("q_input", "k_input", "v_input", "mlp_in")]
    names.append(f"blocks.{layers[-1]}.hook_resid_post")
    _, cache = bridge.run_with_cache(
        CLEAN, [*streams_of_heads(bridge), *graded_points(bridge), *names], incl_bwd=lambda logits: METRIC(logits).sum()
    )
    with torch.no_grad():
        gradients = torch.cat(list(map(ReceiverGradients(cache).of, groups_of(graph, bridge, 1))))
    assert len(gradients) == len(graph.receivers)
    for receiver, gradient in zip(graph.receivers, gradients, strict=True):
        expected = cache[f"{graph.input_of(receiver)}_grad"]
        expected = expected if receiver.place is None else expected[:, :, receiver.place]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7)


@torch.no_grad()
def test_scores_are_the_slopes_of_exact_patching(bridge):
    """What a sender writes goes some of the way to the source run, with all other parts frozen."""
    graph, scores = ComputationalGraph.of(bridge), edge_attribution(bridge, CLEAN, CORRUPTED, METRIC)
    base, source = (Parts.of(bridge, bridge.to_batch(ids)) for ids in (CORRUPTED, CLEAN))

    def measure(edge, share):
        mixed = base.mixed(towards(base, source, share), [edge.sender])
        value = stream(bridge, graph, CORRUPTED, mixed, edge.receiver)
        return METRIC(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[reading(graph, edge.receiver, value)]))

    assert torch.equal(scores.mean().isfinite(), graph.mask)
    size = float(scores.mean().abs().nan_to_num().max())
    for edge in sampled(graph, 2):
        step = 0.02
        near, far = (measure(edge, at) - measure(edge, -at) for at in (step, 2 * step))
        expected = (8 * near - far) / (12 * step)
        ours = scores.of()[graph.index_of(edge)]
        # Softmax is in float32 in most models, so that numeric slopes are coarse.
        torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-4 * size + 2e-5)


def test_rows_are_each_alone(exact, found):
    for row in range(2):
        metric = LogitDifference(METRIC.correct[row], METRIC.incorrect[row])
        alone = edge_attribution(exact, CLEAN[row : row + 1], CORRUPTED[row : row + 1], metric)
        torch.testing.assert_close(found.of()[..., row], alone.of()[..., 0], equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "padding"), [("llama", "left"), ("llama", "holes"), ("gemma2", "right"), ("gemma2", "mixed")]
)
def test_padded_rows_are_each_alone(variant, padding):
    bridge, metric = clearspan.boot(build(variant)), LogitDifference(3, 5)
    pair = pair_of(padding)
    rows = [batch.ids[1:, list(batch.real_columns[1])] for batch in laid_alike(bridge, pair)]
    both, alone = edge_attribution(bridge, *pair, metric), edge_attribution(bridge, *rows, metric)
    size = float(alone.mean().abs().nan_to_num().max())
    torch.testing.assert_close(both.of()[..., 1], alone.of()[..., 0], equal_nan=True, rtol=1e-3, atol=1e-4 * size)


def test_noising_is_denoising_with_the_inputs_exchanged(exact, found):
    other = edge_attribution(exact, CORRUPTED, CLEAN, METRIC, direction="noising")
    assert torch.equal(found.of().nan_to_num(), other.of().nan_to_num())


def test_a_metric_may_be_any_function(exact, found):
    by_row = edge_attribution(exact, CLEAN, CORRUPTED, lambda logits: METRIC(logits))
    in_all = edge_attribution(exact, CLEAN, CORRUPTED, lambda logits: METRIC(logits).mean())
    torch.testing.assert_close(by_row.of(), found.of(), equal_nan=True)
    assert in_all.of().shape[-1] == 1
    torch.testing.assert_close(in_all.mean(), found.mean(), equal_nan=True)


def test_half_precision_is_near_the_whole(found):
    half = edge_attribution(clearspan.boot(build("llama").bfloat16()), CLEAN, CORRUPTED, METRIC)
    assert half.of().dtype == torch.float32
    ours, exact = half.mean()[half.graph.mask].double(), found.mean()[found.graph.mask].double()
    assert torch.corrcoef(torch.stack([ours, exact]))[0, 1] > 0.98


def test_it_leaves_the_model_as_it_was(exact, found):
    assert all(parameter.grad is None for parameter in exact.hf_model.parameters())
    assert not exact.taps.is_listening
    frozen = edge_attribution(
        clearspan.boot(build("llama").double().requires_grad_(False)), CLEAN, CORRUPTED, METRIC, steps=2
    )
    assert torch.equal(frozen.mean().isfinite(), found.mean().isfinite())


# --- integrated gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt_bigcode", "gemma2", "granite", "gpt_neox"])
def test_edges_from_the_embedding_sum_to_the_whole_effect(variant):
    """All that the metric depends on comes in there, so integrated gradients are complete, row by row."""
    bridge = in_float64(variant)
    scores = edge_attribution(bridge, CLEAN, CORRUPTED, METRIC, steps=24)
    whole = scores.after - scores.before
    gap = (scores.of()[0].nansum(0) - whole).abs()
    plain = edge_attribution(bridge, CLEAN, CORRUPTED, METRIC)
    assert gap.max() < 0.02 * whole.abs().max()
    assert gap.max() < 0.2 * (plain.of()[0].nansum(0) - whole).abs().max()


@pytest.mark.parametrize(("scheme", "shares"), [("midpoint", (1 / 6, 3 / 6, 5 / 6)), ("paper", (1 / 3, 2 / 3, 1))])
def test_integrated_gradients_are_means_over_runs_on_the_way(exact, scheme, shares):
    name, point = "blocks.0.hook_resid_pre", "blocks.2.hook_v_input"
    graph = ComputationalGraph.of(exact)
    edge = graph.edge("L0H1->L2H2-3.v")
    scores = edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=3, scheme=scheme)
    base, source = (Parts.of(exact, exact.to_batch(ids)) for ids in (CORRUPTED, CLEAN))
    change = (source.z[0] - base.z[0])[:, :, 1] @ exact.blocks[0].attn.W_O[1].detach()
    expected = 0
    for share in shares:
        entering = torch.lerp(base.entering, source.entering, share)
        with exact.hooks([(name, lambda value, hook, entering=entering: entering)]):
            _, cache = exact.run_with_cache(CORRUPTED, point, incl_bwd=lambda logits: METRIC(logits).sum())
        expected = expected + (cache[f"{point}_grad"][:, :, 1] * change).sum((1, 2)) / 3
    torch.testing.assert_close(scores.of()[graph.index_of(edge)].double(), expected, rtol=1e-4, atol=1e-7)


def test_schemes_are_two_and_meet_where_steps_are_many(exact):
    found = {
        (scheme, steps): edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=steps, scheme=scheme)
        for scheme in ("midpoint", "paper")
        for steps in (1, 16)
    }
    one, many = ((found["midpoint", at].mean() - found["paper", at].mean()).nan_to_num() for at in (1, 16))
    assert many.abs().max() < one.abs().max() / 8
    assert found["paper", 1].title.startswith("EAP-IG of 1 step, gradients at their ends: ")
    # One step of the paper's scheme is the gradient at the source's embeddings.
    noised = edge_attribution(exact, CLEAN, CORRUPTED, METRIC, direction="noising")
    torch.testing.assert_close(found["paper", 1].of(), -noised.of(), equal_nan=True)
    with pytest.raises(InvalidArgumentError, match="unknown scheme='end'"):
        edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=5, scheme="end")


def test_a_distance_from_the_base_has_no_slope_there_but_on_the_way(exact):
    with pytest.raises(InvalidArgumentError, match="the gradient of kl divergence from the base run is zero"):
        edge_attribution(exact, CLEAN, CORRUPTED, KLDivergence("base"))
    scores = edge_attribution(exact, CLEAN, CORRUPTED, KLDivergence("base"), steps=32)
    assert scores.before.abs().max() < 1e-6
    base, clean = (exact(tokens).detach() for tokens in (CORRUPTED, CLEAN))
    log_probs = base[:, -1].log_softmax(-1)
    whole = (log_probs.exp() * (log_probs - clean[:, -1].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(scores.of()[0].nansum(0).double(), whole.double(), rtol=0.05, atol=1e-3)


# --- compared with exact edges ---------------------------------------------------------------------------------------


def test_comparison_is_with_exact_edges(exact, found):
    names = [edge.name for edge in found.best(6)]
    agreement = found.compared_with_exact(names).agreement
    change = patch_edges(exact, CLEAN, CORRUPTED, METRIC, names).change().mean(-1)
    assert agreement.labels == names
    assert agreement.approximate.tolist() == pytest.approx([found.score(name) for name in names])
    torch.testing.assert_close(agreement.exact, change)
    some = found.compared_with_exact(20, seed=2)
    assert len(some.agreement.labels) == 20
    assert some.title.endswith(some.agreement.summary)
    assert f"with exact patching of 20 of {found.graph.n_edges} cells: Pearson " in str(some)


@pytest.mark.parametrize("variant", ["gpt_bigcode", "gemma2", "gemma3", "olmo2"])
def test_where_the_inputs_are_near_each_other_both_agree(variant):
    """Effects of a small change are linear, so that the approximation is exact."""
    bridge = in_float64(variant)
    noise = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    embedding = bridge.embed.module.weight
    with torch.no_grad():
        embedding[CLEAN] = embedding[CORRUPTED] + 1e-3 * noise
    metric = LogitDifference(90, 91)
    near = edge_attribution(bridge, CLEAN, CORRUPTED, metric).compared_with_exact(60).agreement
    assert near.exact.abs().max() > 1e-5
    assert near.largest_error < 0.02 * near.exact.abs().max()
    assert near.pearson > 0.999


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_strongest_edges_come_first(found):
    best = found.best(5)
    values = found.mean()[found.graph.mask].abs()
    assert [abs(found.score(edge)) for edge in best] == pytest.approx(values.topk(5).values.tolist())
    assert found.score(best[0]) == found.score(str(best[0]))
    assert len(found.best(10**6)) == found.graph.n_edges
    top = found.top(5)
    assert top.axes["sender, receiver"] == tuple((edge.sender.name, edge.receiver.name) for edge in best)
    for wrong in (-1, 2.5, "all"):
        with pytest.raises(InvalidArgumentError, match=f"k={wrong!r}"):
            found.best(wrong)
    with pytest.raises(InvalidArgumentError, match="these are the scores of some edges"):
        top.score("embed->logits")


def test_it_prints_plots_and_exports(found):
    before, after = float(found.before.mean()), float(found.after.mean())
    assert found.title == (
        f"EAP: approximate change of logit difference with one of {found.graph.n_edges} edges from the clean run; "
        f"corrupted run {before:.4f}, clean run {after:.4f}; mean over 2 rows; not compared with exact patching"
    )
    table = found.to_dataframe()
    assert list(table.columns) == ["sender", "receiver", "score", "standard error"]
    assert len(table) == found.graph.n_edges
    assert not table.score.isna().any()
    (best,) = found.best(1)
    assert str(found).splitlines()[2].split()[:2] == [best.sender.name, best.receiver.name]
    heat = found.plot().data[0]
    assert list(heat.y) == [node.name for node in found.graph.senders]
    assert list(heat.x) == [node.name for node in found.graph.receivers]


def test_steps_are_counted(exact):
    with pytest.raises(InvalidArgumentError, match="steps=0\n  expected: a whole number, steps >= 1"):
        edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=0)
    assert edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=2).title.startswith("EAP-IG of 2 steps: ")


def test_what_reads_nothing_is_refused():
    with pytest.raises(InvalidArgumentError, match="embed reads nothing by itself"):
        ComputationalGraph(1, 1, 1).input_of(Node("embed"))


def passes(bridge, function):
    """Returns the rows of each forward of a block, and how often a backward came through it, in a call."""
    seen = {"rows": [], "backwards": 0}
    block = bridge.hf_model.model.layers[1]

    def back(*_):
        seen["backwards"] += 1

    handles = [
        block.register_forward_hook(lambda _, args, output: seen["rows"].append(len(args[0]))),
        block.mlp.down_proj.register_full_backward_hook(back),
    ]
    function()
    for handle in handles:
        handle.remove()
    return seen["rows"], seen["backwards"]


def test_two_forwards_and_one_backward_are_all(exact):
    """Of few tokens both runs are one batch; of more, the source's rows would cost in the backward."""
    longer = [torch.cat([ids, ids], 1) for ids in (CLEAN, CORRUPTED)]
    assert passes(exact, lambda: edge_attribution(exact, CLEAN, CORRUPTED, METRIC)) == ([4], 1)
    assert passes(exact, lambda: edge_attribution(exact, *longer, METRIC)) == ([2, 2], 1)
    assert passes(exact, lambda: attribution_patch(exact, CLEAN, CORRUPTED, METRIC)) == ([4], 1)
    assert passes(exact, lambda: attribution_patch(exact, *longer, METRIC)) == ([2, 2], 1)


def test_the_steps_of_integrated_gradients_are_one_batch(exact):
    assert passes(exact, lambda: edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=5)) == ([4, 10], 1)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 2])
def test_runs_in_one_batch_are_those_in_two(bridge, steps):
    """Two rows of twelve tokens are two batches; each row alone is one."""
    clean, corrupted = (torch.cat([one, other], 1) for one, other in ((ids(3), ids(5)), (ids(4), ids(6))))
    both = edge_attribution(bridge, clean, corrupted, METRIC, steps=steps)
    for row in range(2):
        metric = LogitDifference(METRIC.correct[row], METRIC.incorrect[row])
        alone = edge_attribution(bridge, clean[row : row + 1], corrupted[row : row + 1], metric, steps=steps)
        size = float(alone.mean().abs().nan_to_num().max())
        torch.testing.assert_close(both.of()[..., row], alone.of()[..., 0], equal_nan=True, rtol=1e-4, atol=1e-5 * size)
        torch.testing.assert_close(both.before[row], alone.before[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both.after[row], alone.after[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", ["MOST", "TOGETHER"])
@pytest.mark.parametrize("steps", [None, 3])
def test_little_room_changes_no_score(bridge, steps, limit, monkeypatch):
    """Row by row, a step at a time, a sublayer's receivers at a time."""
    expected = edge_attribution(bridge, CLEAN, CORRUPTED, METRIC, steps=steps)
    monkeypatch.setattr(edge_scores, limit, 1)
    if limit == "MOST":
        monkeypatch.setattr(runs, limit, 1)
    found = edge_attribution(bridge, CLEAN, CORRUPTED, METRIC, steps=steps)
    size = float(expected.mean().abs().nan_to_num().max())
    torch.testing.assert_close(found.of(), expected.of(), equal_nan=True, rtol=1e-4, atol=1e-5 * size)


def test_steps_are_measured_each_by_a_metric_of_all_rows(exact):
    """Such a metric is called with the rows of one step."""
    shapes = []

    def metric(logits):
        shapes.append(len(logits))
        return METRIC(logits).pow(3).mean()

    found = edge_attribution(exact, CLEAN, CORRUPTED, metric, steps=3)
    assert set(shapes) == {2}
    separate = [
        edge_attribution(exact, CLEAN, CORRUPTED, metric, steps=1, scheme="paper").mean(),
        edge_attribution(exact, CLEAN, CORRUPTED, metric, steps=2, scheme="paper").mean(),
    ]
    middle = edge_attribution(exact, CLEAN, CORRUPTED, metric, steps=1).mean()
    # The ends of two steps are the middle and the end.
    torch.testing.assert_close(separate[1], (middle + separate[0]) / 2, equal_nan=True, rtol=1e-4, atol=1e-7)
    assert found.mean()[found.graph.mask].isfinite().all()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("steps", [None, 2])
def test_a_metric_that_raises_leaves_the_model_as_it_was(exact, found, error, steps):
    def metric(logits):
        raise error

    before = [(parameter.requires_grad, parameter.grad) for parameter in exact.hf_model.parameters()]
    with pytest.raises(error):
        edge_attribution(exact, CLEAN, CORRUPTED, metric, steps=steps)
    assert torch.is_grad_enabled()
    assert before == [(parameter.requires_grad, parameter.grad) for parameter in exact.hf_model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in exact.hf_model.modules())
    again = edge_attribution(exact, CLEAN, CORRUPTED, METRIC)
    assert torch.equal(again.of().nan_to_num(), found.of().nan_to_num())


def test_the_pair_is_checked_first(exact):
    pair = PairRuns.of(exact, CLEAN, CORRUPTED, METRIC, "noising")
    assert (pair.base_name, pair.source_name) == ("clean", "corrupted")
    with pytest.raises(InvalidArgumentError, match="the two inputs do not lie position on position"):
        edge_attribution(exact, CLEAN, CORRUPTED[:1], METRIC)
