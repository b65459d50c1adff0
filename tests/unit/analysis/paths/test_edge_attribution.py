import pytest
import torch
from tests.zoo import CONTINUOUS, MODELS, build

import clearspan
from clearspan.analysis import ComputationalGraph, Edge, Node, edge_attribution, patch_edges
from clearspan.analysis.paths.edge_attribution import read, receiver_gradients
from clearspan.analysis.paths.edge_patching import input_of, stream_of
from clearspan.analysis.paths.patching_pair import PatchingPair
from clearspan.analysis.paths.sender_changes import sender_changes, written
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


def base_and_source(bridge, names):
    with torch.no_grad():
        return [bridge.run_with_cache(tokens, list(names))[1] for tokens in (CORRUPTED, CLEAN)]


def change_of(bridge, sender, base, source):
    """Returns what a sender adds in the source run more than in the base run, from plain values."""

    def added(cache):
        match sender.kind:
            case "embed":
                return cache["resid_pre", 0]
            case "mlp":
                return cache["mlp_out", sender.layer]
        block = bridge.blocks[sender.layer]
        result = cache["z", sender.layer][:, :, sender.heads[0]] @ block.attn.W_O[sender.heads[0]].detach()
        if "ln1_post" in block.submodules:
            result = result / cache[f"{block.ln1_post.path}.hook_scale"] * block.ln1_post.w.detach()
        return result * block.residual_multiplier

    return added(source) - added(base)


def hook_on(bridge, edge, change):
    """Returns a hook that adds to what an edge's receiver reads."""
    place = edge.receiver.place

    def add(value, hook):
        if place is None:
            return value + change
        value[:, :, place] += change
        return value

    return input_of(bridge, edge.receiver), add


# --- the graph -------------------------------------------------------------------------------------------------------


def test_an_edge_is_where_the_receiver_sees_the_sender(bridge):
    """What a sender adds is changed, and the streams that receivers read are looked at."""
    graph, mask = ComputationalGraph.of(bridge), ComputationalGraph.of(bridge).mask
    assert mask.shape == (len(graph.senders), len(graph.receivers))
    assert graph.n_edges == int(mask.sum()) == len(list(graph.edges()))
    streams = [stream_of(bridge, receiver) for receiver in graph.receivers]
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


def test_names_are_stable_and_lead_back():
    graph = ComputationalGraph(n_layers=2, n_heads=4, n_kv_heads=2)
    assert [node.name for node in graph.senders[:7]] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0.mlp", "L1H0"]
    assert [node.name for node in graph.reading(1)] == [
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
    _, cache = bridge.run_with_cache(CLEAN, [*read(bridge), *names], incl_bwd=lambda logits: METRIC(logits).sum())
    with torch.no_grad():
        gradients = torch.cat(list(receiver_gradients(cache)))
    assert len(gradients) == len(graph.receivers)
    for receiver, gradient in zip(graph.receivers, gradients, strict=True):
        expected = cache[f"{input_of(bridge, receiver)}_grad"]
        expected = expected if receiver.place is None else expected[:, :, receiver.place]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7)


def test_what_senders_add_sums_to_the_stream(bridge):
    """But for output biases, which a norm after attention scales otherwise in each run."""
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    base, source = base_and_source(bridge, [*written(bridge), last])
    with torch.no_grad():
        changes = sender_changes(base, source)
    # Norms in float32, whatever the model is in.
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(changes.sum(0), source[last] - base[last], **near)
    for sender, change in zip(ComputationalGraph.of(bridge).senders, changes, strict=True):
        torch.testing.assert_close(change, change_of(bridge, sender, base, source), **near)


def test_scores_are_the_slopes_of_what_receivers_read(bridge):
    graph, scores = ComputationalGraph.of(bridge), edge_attribution(bridge, CLEAN, CORRUPTED, METRIC)
    base, source = base_and_source(bridge, written(bridge))

    def measure(edge, change, factor):
        with torch.no_grad():
            return METRIC(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[hook_on(bridge, edge, factor * change)]))

    assert torch.equal(scores.scores.isfinite(), graph.mask)
    size = float(scores.scores.abs().nan_to_num().max())
    for edge in sampled(graph, 2):
        change, step = change_of(bridge, edge.sender, base, source), 0.02
        near, far = (measure(edge, change, at) - measure(edge, change, -at) for at in (step, 2 * step))
        expected = (8 * near - far) / (12 * step)
        ours = scores.per_row[(slice(None), *graph.index_of(edge))]
        # Softmax is in float32 in most models, so that numeric slopes are coarse.
        torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-4 * size + 2e-5)


def test_rows_are_each_alone(exact, found):
    for row in range(2):
        metric = LogitDifference(METRIC.correct[row], METRIC.incorrect[row])
        alone = edge_attribution(exact, CLEAN[row : row + 1], CORRUPTED[row : row + 1], metric)
        torch.testing.assert_close(found.per_row[row], alone.per_row[0], equal_nan=True, rtol=1e-4, atol=1e-6)


def test_padded_rows_are_each_alone(exact):
    mask, metric = torch.ones(2, 6, dtype=torch.long), LogitDifference(3, 5)
    mask[1, :2] = 0
    both = edge_attribution(exact, CLEAN * mask, CORRUPTED * mask, metric, attention_mask=mask)
    alone = edge_attribution(exact, CLEAN[1:, 2:], CORRUPTED[1:, 2:], metric)
    torch.testing.assert_close(both.per_row[1], alone.per_row[0], equal_nan=True, rtol=1e-4, atol=1e-6)


def test_noising_is_denoising_with_the_inputs_exchanged(exact, found):
    other = edge_attribution(exact, CORRUPTED, CLEAN, METRIC, direction="noising")
    assert torch.equal(found.per_row.nan_to_num(), other.per_row.nan_to_num())


def test_a_metric_may_be_any_function(exact, found):
    by_row = edge_attribution(exact, CLEAN, CORRUPTED, lambda logits: METRIC(logits))
    in_all = edge_attribution(exact, CLEAN, CORRUPTED, lambda logits: METRIC(logits).mean())
    torch.testing.assert_close(by_row.per_row, found.per_row, equal_nan=True)
    assert in_all.per_row.shape[0] == 1
    torch.testing.assert_close(in_all.scores, found.scores, equal_nan=True)


def test_half_precision_is_near_the_whole(found):
    half = edge_attribution(clearspan.boot(build("llama").bfloat16()), CLEAN, CORRUPTED, METRIC)
    assert half.per_row.dtype == torch.float32
    ours, exact = half.scores[half.graph.mask].double(), found.scores[found.graph.mask].double()
    assert torch.corrcoef(torch.stack([ours, exact]))[0, 1] > 0.98


def test_it_leaves_the_model_as_it_was(exact, found):
    assert all(parameter.grad is None for parameter in exact.hf_model.parameters())
    assert not exact.taps.is_listening
    frozen = edge_attribution(
        clearspan.boot(build("llama").double().requires_grad_(False)), CLEAN, CORRUPTED, METRIC, steps=2
    )
    assert torch.equal(frozen.scores.isfinite(), found.scores.isfinite())


# --- integrated gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt_bigcode", "gemma2", "granite", "gpt_neox"])
def test_edges_from_the_embedding_sum_to_the_whole_effect(variant):
    """All that the metric depends on comes in there, so integrated gradients are complete, row by row."""
    bridge = in_float64(variant)
    scores = edge_attribution(bridge, CLEAN, CORRUPTED, METRIC, steps=24)
    whole = scores.source - scores.base
    gap = (scores.per_row[:, 0].nansum(-1) - whole).abs()
    plain = edge_attribution(bridge, CLEAN, CORRUPTED, METRIC)
    assert gap.max() < 0.02 * whole.abs().max()
    assert gap.max() < 0.2 * (plain.per_row[:, 0].nansum(-1) - whole).abs().max()


def test_integrated_gradients_are_means_over_runs_on_the_way(exact):
    name = "blocks.0.hook_resid_pre"
    base, source = base_and_source(exact, written(exact))
    graph = ComputationalGraph.of(exact)
    edge = graph.edge("L0H1->L2H2-3.v")
    scores = edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=3)
    point, change = "blocks.2.hook_v_input", change_of(exact, edge.sender, base, source)
    expected = 0
    for share in (1 / 6, 3 / 6, 5 / 6):
        entering = torch.lerp(base[name], source[name], share)
        with exact.hooks([(name, lambda value, hook, entering=entering: entering)]):
            _, cache = exact.run_with_cache(CORRUPTED, point, incl_bwd=lambda logits: METRIC(logits).sum())
        expected = expected + (cache[f"{point}_grad"][:, :, 1] * change).sum((1, 2)) / 3
    torch.testing.assert_close(
        scores.per_row[(slice(None), *graph.index_of(edge))].double(), expected, rtol=1e-4, atol=1e-7
    )


def test_a_distance_from_the_base_has_no_slope_there_but_on_the_way(exact):
    with pytest.raises(InvalidArgumentError, match="the gradient of kl divergence from the base run is zero"):
        edge_attribution(exact, CLEAN, CORRUPTED, KLDivergence("base"))
    scores = edge_attribution(exact, CLEAN, CORRUPTED, KLDivergence("base"), steps=32)
    assert scores.base.abs().max() < 1e-6
    whole = KLDivergence("base").measure(
        exact(CLEAN).detach(), clearspan.sweep.metrics.Context(references={"base": exact(CORRUPTED).detach()})
    )
    torch.testing.assert_close(scores.per_row[:, 0].nansum(-1).double(), whole.double(), rtol=0.05, atol=1e-3)


# --- exact edges -----------------------------------------------------------------------------------------------------


def test_exact_edges_are_runs_with_a_hook(bridge):
    graph = ComputationalGraph.of(bridge)
    base, source = base_and_source(bridge, written(bridge))
    edges = list(sampled(graph, 2, seed=1))
    result = patch_edges(bridge, CLEAN, CORRUPTED, METRIC, edges)
    assert result.axes == {"edge": tuple(edge.name for edge in edges)}
    for number, edge in enumerate(edges):
        hook = hook_on(bridge, edge, change_of(bridge, edge.sender, base, source))
        with torch.no_grad():
            expected = METRIC(bridge.run_with_hooks(CORRUPTED, fwd_hooks=[hook]))
        torch.testing.assert_close(result.of()[number].double(), expected, rtol=1e-4, atol=1e-4)


def test_sets_of_edges_are_patched_together(exact):
    graph, base_source = ComputationalGraph.of(exact), base_and_source(exact, written(exact))
    sets = {
        "two senders": ["embed->L1H2.q", "L0H1->L1H2.q"],
        "two heads of a point": ["L0H1->L1H2.q", "L0.mlp->L1H3.q"],
        "two receivers": ["embed->L0.mlp", "L1H0->logits"],
    }
    result = patch_edges(exact, CLEAN, CORRUPTED, METRIC, sets, direction="noising")
    source, base = base_source  # the clean run is the base
    _, clean = exact.run_with_cache(CLEAN, "blocks.2.hook_resid_post")
    for number, names in enumerate(sets.values()):
        edges = [graph.edge(name) for name in names]
        hooks = [hook_on(exact, edge, change_of(exact, edge.sender, base, source)) for edge in edges]
        if number == 2:  # the last stream is the base's, not what the changed MLP makes of it
            change = change_of(exact, edges[1].sender, base, source)
            hooks[1] = (hooks[1][0], lambda value, hook, change=change: clean[hook.name] + change)
        with torch.no_grad():
            expected = METRIC(exact.run_with_hooks(CLEAN, fwd_hooks=hooks))
        torch.testing.assert_close(result.of()[number].double(), expected, rtol=1e-4, atol=1e-4)


def test_edges_into_the_logits_are_all_that_the_direct_path_carries(exact):
    """Patched together, they make the last stream the source's."""
    graph = ComputationalGraph.of(exact)
    every = [edge for edge in graph.edges() if edge.receiver.kind == "logits"]
    result = patch_edges(exact, CLEAN, CORRUPTED, METRIC, {"all": every})
    torch.testing.assert_close(result.of()[0].double(), METRIC(exact(CLEAN)).detach(), rtol=1e-5, atol=1e-5)


def test_comparison_is_with_exact_edges(exact, found):
    names = [edge.edge.name for edge in found.top(6)]
    agreement = found.compared_with_exact(names).agreement
    change = patch_edges(exact, CLEAN, CORRUPTED, METRIC, names).change().mean(-1)
    assert agreement.labels == names
    assert agreement.approximate.tolist() == [found.score(name) for name in names]
    torch.testing.assert_close(agreement.exact, change)
    some = found.compared_with_exact(20, seed=2)
    assert len(some.agreement.labels) == 20
    assert some.title.endswith(some.agreement.summary)
    assert f"with exact patching of 20 of {found.graph.n_edges} cells: Pearson " in str(some)


def test_where_the_inputs_are_near_each_other_both_agree():
    """Effects of a small change are linear, so that the approximation is exact."""
    bridge = in_float64("gpt_bigcode")
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
    top = found.top(5)
    values = found.scores[found.graph.mask].abs()
    assert [abs(one.score) for one in top] == pytest.approx(values.topk(5).values.tolist())
    assert found.score(top[0].edge) == found.score(str(top[0])) == top[0].score
    assert len(found.top(10**6)) == found.graph.n_edges


def test_it_prints_plots_and_exports(found):
    assert found.title == (
        f"EAP: approximate change of logit difference with one of {found.graph.n_edges} edges from the clean run; "
        f"corrupted run {found.base.mean():.4f}, clean run {found.source.mean():.4f}; mean over 2 rows; "
        "not compared with exact patching"
    )
    table = found.to_dataframe()
    assert list(table.columns) == ["sender", "receiver", "score"]
    assert len(table) == found.graph.n_edges
    assert not table.score.isna().any()
    first = str(found).splitlines()[2].split()
    assert first[:2] == [found.top(1)[0].edge.sender.name, found.top(1)[0].edge.receiver.name]
    heat = found.plot().data[0]
    assert list(heat.y) == [node.name for node in found.graph.senders]
    assert list(heat.x) == [node.name for node in found.graph.receivers]


def test_steps_are_counted(exact):
    with pytest.raises(InvalidArgumentError, match="steps=0\n  expected: steps > 0"):
        edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=0)
    assert edge_attribution(exact, CLEAN, CORRUPTED, METRIC, steps=2).title.startswith("EAP-IG of 2 steps: ")


def test_a_cell_without_edges_is_refused(exact):
    with pytest.raises(InvalidArgumentError, match="there is no edge to patch"):
        patch_edges(exact, CLEAN, CORRUPTED, METRIC, [])
    with pytest.raises(InvalidArgumentError, match=r"there is no edge 'L2H0->L1\.mlp'"):
        patch_edges(exact, CLEAN, CORRUPTED, METRIC, ["L2H0->L1.mlp"])
    with pytest.raises(InvalidArgumentError, match="embed reads nothing by itself"):
        input_of(exact, Node("embed"))


def test_two_forwards_and_one_backward_are_all(exact):
    passes = []
    block = exact.hf_model.model.layers[1]
    handles = [
        block.register_forward_hook(lambda *_: passes.append("forward")),
        block.mlp.down_proj.register_full_backward_hook(lambda *_: passes.append("backward")),
    ]
    edge_attribution(exact, CLEAN, CORRUPTED, METRIC)
    for handle in handles:
        handle.remove()
    assert passes == ["forward", "forward", "backward"]


def test_the_pair_is_checked_first(exact):
    pair = PatchingPair.of(exact, CLEAN, CORRUPTED, METRIC, "noising", None)
    assert (pair.base_name, pair.source_name) == ("clean", "corrupted")
    with pytest.raises(InvalidArgumentError, match="the two inputs do not lie position on position"):
        edge_attribution(exact, CLEAN, CORRUPTED[:1], METRIC)
