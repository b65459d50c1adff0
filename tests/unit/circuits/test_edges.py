import pytest
import torch
from tests.unit.circuits.frozen import (
    PADDINGS,
    Parts,
    laid_alike,
    logits_with_edges,
    pair_of,
    reading,
    set_to,
    values_at,
)
from tests.zoo import build

import clearspan
from clearspan.circuits import ComputationalGraph, Node, patch_edges, path_patching
from clearspan.errors import AbsentPointError, InvalidArgumentError
from clearspan.sweep import KLDivergence, LogitDifference

POST_NORM = ("gemma2", "gemma3", "olmo2")
VARIANTS = (
    *POST_NORM,
    *("gpt_bigcode", "gpt_bigcode multi-head", "llama", "gpt_neox", "granite", "opt", "mixtral", "falcon grouped"),
    "cohere2",
)
"""Norms on outputs; shared keys and values, biases, multipliers, parallel blocks with norms apart and shared."""
CASES = [
    *(("gemma2", padding) for padding in PADDINGS),
    *(("gemma3", "left"), ("gemma3", "mixed"), ("olmo2", "none"), ("olmo2", "right")),
    *((variant, PADDINGS[number % len(PADDINGS)]) for number, variant in enumerate(VARIANTS[len(POST_NORM) :])),
]
METRIC = LogitDifference(3, 5, position=(-1, 2))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join(case))
def case(request):
    """A bridge, the pair as it is given, and both inputs in the clean one's columns."""
    variant, padding = request.param
    bridge, pair = clearspan.boot(build(variant)), pair_of(padding)
    return bridge, pair, *laid_alike(bridge, pair)


@pytest.fixture(scope="module")
def llama():
    return clearspan.boot(build("llama"))


CLEAN, CORRUPTED = pair_of("none")


def measured(logits, batch):
    return METRIC(logits, batch).detach()


# --- edges -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_edges_are_runs_in_which_all_other_parts_are_frozen(case, direction):
    """Among them several heads of a layer to one receiver, which a norm on attention's output mixes."""
    bridge, pair, clean, corrupted = case
    graph = ComputationalGraph.of(bridge)
    shared = {kind: next(node.name for node in graph.attention_inputs(2) if node.kind == kind) for kind in "kv"}
    cells = {
        "one head": ["L0H1->L1H2.q"],
        "one MLP": ["L0.mlp->L2.mlp"],
        "two heads of a layer": ["L1H0->logits", "L1H3->logits"],
        "all heads of a layer": [f"L0H{head}->{shared['v']}" for head in range(4)],
        "a mix": ["embed->L2.mlp", "L0H0->L2.mlp", "L0H2->L2.mlp", "L1H1->L2.mlp", "L1.mlp->L2.mlp"],
        "two receivers of a point": ["L0H1->L2H2.q", "L0.mlp->L2H3.q", f"embed->{shared['k']}"],
        "two receivers in a row": ["embed->L0.mlp", "L1H0->logits"],
    }
    found = patch_edges(bridge, *pair, METRIC, cells, direction=direction, progress=False)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    expected = [logits_with_edges(bridge, graph, base, source, graph.parsed(cell)) for cell in cells.values()]
    expected = torch.stack([measured(logits, base) for logits in expected])
    torch.testing.assert_close(found.of(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.base["logit_difference"], measured(bridge(base), base), rtol=1e-5, atol=1e-5)
    assert found.change().abs().max() > 1e-2


@torch.no_grad()
def test_all_edges_into_the_logits_make_the_last_stream_the_source_s(case):
    bridge, pair, clean, _ = case
    every = [edge for edge in ComputationalGraph.of(bridge).edges() if edge.receiver.kind == "logits"]
    found = patch_edges(bridge, *pair, METRIC, {"all": every}, progress=False)
    torch.testing.assert_close(found.of()[0], measured(bridge(clean), clean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.normalised("clean"), torch.ones(1), rtol=1e-4, atol=1e-4)


# --- paths -----------------------------------------------------------------------------------------------------------

SENDERS = ("embed", "L0H2", "L0.mlp", "L1H1")
RECEIVERS = ("L2H1.q", "L2H3.k", "L1H0.v", "L1.mlp", ["L2.mlp", "logits"])


def streams_from(bridge, graph, base, source, ours, theirs, sender, freeze):
    """Returns all streams of the base run where one sender writes as in the source run, by hook point's name."""
    names, mixed = list(dict.fromkeys(map(graph.stream_of, graph.receivers))), ours.mixed(theirs, [sender])
    if freeze == "all":
        return values_at(bridge, base, mixed.hooks(), names)
    layer = -1 if sender.layer is None else sender.layer
    own = {
        "embed": ("blocks.0.hook_resid_pre", mixed.entering),
        "head": (f"blocks.{layer}.attn.hook_z", mixed.z[layer]),
        "mlp": (f"blocks.{layer}.hook_mlp_out", mixed.mlp[layer]),
    }[sender.kind]
    later = [f"blocks.{after}.hook_attn_out" for after in range(layer + 1, graph.n_layers)]
    frozen = [(name, set_to(value)) for name, value in values_at(bridge, base, (), later).items()]
    return values_at(bridge, base, [(own[0], set_to(own[1])), *frozen], names)


@torch.no_grad()
@pytest.mark.parametrize("freeze", ["all", "attention"])
def test_paths_are_runs_in_which_what_is_between_is_frozen(case, freeze):
    bridge, pair, clean, corrupted = case
    graph = ComputationalGraph.of(bridge)
    found = path_patching(bridge, *pair, METRIC, SENDERS, RECEIVERS, freeze=freeze, progress=False)
    ours, theirs = Parts.of(bridge, corrupted), Parts.of(bridge, clean)
    for row, sender in enumerate(map(graph.node, SENDERS)):
        streams = streams_from(bridge, graph, corrupted, clean, ours, theirs, sender, freeze)
        for column, names in enumerate(RECEIVERS):
            group = [graph.node(name) for name in ([names] if isinstance(names, str) else names)]
            reached = [node for node in group if graph.senders.index(sender) < graph.n_senders_before(node)]
            hooks = [reading(graph, node, streams[graph.stream_of(node)]) for node in reached]
            expected = measured(bridge.run_with_hooks(corrupted, fwd_hooks=hooks), corrupted)
            close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max() + 1)}
            torch.testing.assert_close(found.of()[row, column], expected, **close, msg=f"{sender}->{names}")


@torch.no_grad()
def test_the_direct_path_is_the_edge(case):
    bridge, pair, _, _ = case
    graph = ComputationalGraph.of(bridge)
    edges = [f"{sender}->{receiver}" for sender in ("embed", "L0H3", "L0.mlp") for receiver in ("L2H1.q", "logits")]
    paths = path_patching(bridge, *pair, METRIC, ["embed", "L0H3", "L0.mlp"], ["L2H1.q", "logits"], progress=False)
    found = patch_edges(bridge, *pair, METRIC, edges, progress=False)
    assert torch.equal(paths.of().flatten(0, 1), found.of())
    assert found.axes["edge"] == tuple(edge.name for edge in graph.parsed(edges))


@torch.no_grad()
@pytest.mark.parametrize("freeze", ["all", "attention"])
def test_neurons_send_too_also_next_to_their_mlp(case, freeze):
    bridge, pair, clean, corrupted = case
    if "blocks.0.mlp.hook_post" not in bridge.hook_dict:
        with pytest.raises(AbsentPointError):
            path_patching(bridge, *pair, METRIC, ["L0N7"], ["logits"], freeze=freeze, progress=False)
        return
    names = ["L0N7", "L0.mlp", "L1N3"]
    found = path_patching(bridge, *pair, METRIC, names, ["logits", "L2.mlp"], freeze=freeze, progress=False)
    ours = Parts.of(bridge, corrupted)
    for row, layer, neuron in ((0, 0, 7), (2, 1, 3)):
        post = f"blocks.{layer}.mlp.hook_post"
        theirs = values_at(bridge, clean, (), [post])[post][..., neuron]

        def write(value, hook, neuron=neuron, theirs=theirs):
            value[..., neuron] = theirs

        if freeze == "all":
            hooks = [hook for hook in ours.hooks() if hook[0] != f"blocks.{layer}.hook_mlp_out"]
        else:
            later = [f"blocks.{after}.hook_attn_out" for after in range(layer + 1, 3)]
            hooks = [(name, set_to(value)) for name, value in values_at(bridge, corrupted, (), later).items()]
        last = "blocks.2.hook_resid_post"
        value = values_at(bridge, corrupted, [*hooks, (post, write)], [last])[last]
        expected = measured(bridge.read_out(value), corrupted)
        torch.testing.assert_close(found.of()[row, 0], expected, rtol=1e-4, atol=1e-4)


def test_batches_do_not_change_what_is_found(llama):
    senders, receivers = [f"L0H{head}" for head in range(4)], ["L2.mlp", "logits"]
    one, many = (
        path_patching(
            llama, CLEAN, CORRUPTED, LogitDifference(3, 5), senders, receivers, freeze="attention", memory=memory,
            progress=False,
        )
        for memory in (1, None)
    )  # fmt: skip
    torch.testing.assert_close(one.of(), many.of(), rtol=1e-5, atol=1e-5)


def test_metrics_may_be_several_and_compare_with_either_run(llama):
    metrics = {"difference": LogitDifference(3, 5), "divergence": KLDivergence("clean"), "plain": lambda x: x.mean()}
    found = path_patching(llama, CLEAN, CORRUPTED, metrics, "embed", "logits", progress=False)
    assert found.axes == {"sender": ("embed",), "receiver": ("logits",)}
    assert found.of("divergence").shape == (1, 1, 2)
    torch.testing.assert_close(found.sources["clean"]["divergence"], torch.zeros(2), rtol=0, atol=1e-6)
    edges = patch_edges(llama, CLEAN, CORRUPTED, metrics, "embed->logits", progress=False)
    assert torch.equal(edges.of("divergence")[0], found.of("divergence")[0, 0])


def test_texts_of_one_length_are_a_pair(embedded):
    metric = LogitDifference.between(embedded, " os", " re")
    clean, corrupted = ["import os\nimport", "import os"], ["import re\nimport", "import re"]
    found = patch_edges(embedded, clean, corrupted, metric, ["embed->L0.mlp", "L4H0->logits"], progress=False)
    for row in range(2):
        alone = patch_edges(embedded, clean[row], corrupted[row], metric, list(found.axes["edge"]), progress=False)
        torch.testing.assert_close(found.of()[:, row], alone.of()[:, 0], rtol=1e-4, atol=1e-4)


# --- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("senders", "receivers", "settings", "message"),
    [
        (["L0H9"], ["logits"], {}, "there is no node 'L0H9'"),
        (["logits"], ["logits"], {}, "'logits' writes nothing to the residual stream"),
        (["L0N999"], ["logits"], {}, "there is no neuron 'L0N999'"),
        (["L9N0"], ["logits"], {}, r"there is no node 'L9\.mlp'"),
        (["L0H0"], ["embed"], {}, "'embed' reads no residual stream"),
        (["L0H0"], [Node("q", 7, (0,))], {}, "reads no residual stream"),
        (["L0H0"], ["L7H1.q"], {}, r"there is no node 'L7H1\.q'"),
        ([3], ["logits"], {}, "there is no node 3"),
        ([], ["logits"], {}, r"senders=\[\]"),
        (["L0H0"], [], {}, r"receivers=\[\]"),
        (["L0H0"], [[]], {}, r"receivers=\[\]"),
        ([["L0H0"]], ["logits"], {}, "there is no node"),
        (3, ["logits"], {}, "senders=3"),
        (["L0H0"], ["logits"], {"freeze": "mlp"}, "unknown freeze='mlp'"),
        (["L0H0"], ["logits"], {"direction": "denoise"}, "unknown direction 'denoise'"),
        (["L0H0"], ["logits"], {"memory": -1}, "memory=-1"),
        (["L0H0"], ["logits"], {"corrupted": CORRUPTED[:, :5]}, "the two inputs do not lie position on position"),
    ],
)
def test_mistakes_in_paths_are_named(llama, senders, receivers, settings, message):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": LogitDifference(3, 5), **settings}
    with pytest.raises(InvalidArgumentError, match=message):
        path_patching(llama, senders=senders, receivers=receivers, progress=False, **given)


@pytest.mark.parametrize(
    ("edges", "settings", "message"),
    [
        ([], {}, "edges: there is no edge to patch"),
        ({}, {}, "edges: there is no edge to patch"),
        ({"nothing": []}, {}, "edges: there is no edge to patch"),
        (["L2H0->L1.mlp"], {}, r"there is no edge 'L2H0->L1\.mlp'"),
        (["L0H0"], {}, "there is no node ''"),
        ([3], {}, "an edge is given by its name"),
        (3, {}, "edges are given as a list"),
        (["L0H0->logits"], {"direction": "both"}, "unknown direction 'both'"),
    ],
)
def test_mistakes_in_edges_are_named(llama, edges, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        patch_edges(llama, CLEAN, CORRUPTED, LogitDifference(3, 5), edges, progress=False, **settings)


def test_a_stream_that_is_no_sum_is_refused():
    bridge = clearspan.boot(build("opt post-norm"))
    with pytest.raises(InvalidArgumentError, match="is not the sum of what its parts write"):
        path_patching(bridge, CLEAN, CORRUPTED, LogitDifference(3, 5), ["L0H0"], ["logits"], progress=False)
