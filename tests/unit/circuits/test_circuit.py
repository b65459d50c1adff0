import json

import pytest
import torch
from tests.unit.circuits.frozen import PADDINGS, laid_alike, logits_of_circuit, pair_of
from tests.zoo import build

import clearspan
from clearspan.circuits import Circuit, ComputationalGraph, edge_attribution, evaluate_circuits, faithfulness_curve
from clearspan.circuits.evaluation import CircuitRuns
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import KLDivergence, LogitDifference

VARIANTS = (
    *("gpt_bigcode", "gpt_bigcode multi-head", "llama", "gpt_neox", "granite", "opt", "mixtral", "falcon grouped"),
    "cohere2",
)
CASES = [
    *(("gemma2", padding) for padding in PADDINGS),
    *(("gemma3", "left"), ("gemma3", "mixed"), ("olmo2", "none"), ("olmo2", "right")),
    *((variant, PADDINGS[number % len(PADDINGS)]) for number, variant in enumerate(VARIANTS)),
]
METRIC = LogitDifference(3, 5)
GRAPH = ComputationalGraph(n_layers=2, n_heads=4, n_kv_heads=2)


@pytest.fixture(scope="module")
def runs():
    return pair_of("none")


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot(build("gpt_bigcode"))


def circuit_of(*names, graph=GRAPH):
    return Circuit(graph, frozenset()).with_edges(names)


# --- circuits as sets ------------------------------------------------------------------------------------------------


def test_circuits_combine_as_sets():
    one, other = circuit_of("embed->L0.mlp", "L0.mlp->logits"), circuit_of("L0.mlp->logits", "L0H1->logits")
    assert [edge.name for edge in one & other] == ["L0.mlp->logits"]
    assert (one | other).n_edges == len(one | other) == 3
    assert [edge.name for edge in one - other] == ["embed->L0.mlp"]
    assert one & other <= one
    assert not one <= other
    assert "L0.mlp->logits" in one
    assert "L0H1->logits" not in one
    assert one.without("embed->L0.mlp", "L0.mlp->logits").n_edges == 0
    assert one.complement().n_edges == GRAPH.n_edges - 2
    assert one.complement().complement() == one
    assert one == circuit_of("L0.mlp->logits", "embed->L0.mlp")
    assert len({one, circuit_of("L0.mlp->logits", "embed->L0.mlp")}) == 1


def test_edges_and_nodes_come_in_the_order_of_the_forward():
    found = circuit_of("L1H2->logits", "L0.mlp->L1H2-3.k", "embed->L0.mlp", "embed->L1H2.q")
    assert [edge.name for edge in found] == ["embed->L0.mlp", "embed->L1H2.q", "L0.mlp->L1H2-3.k", "L1H2->logits"]
    assert [node.name for node in found.nodes] == ["embed", "L0.mlp", "L1H2.q", "L1H2-3.k", "L1H2", "logits"]
    assert found.mask.sum() == 4
    assert found.mask[GRAPH.index_of(GRAPH.edge("embed->L1H2.q"))]


def test_a_circuit_is_printed_by_what_reads():
    found = circuit_of("L0H1->logits", "embed->logits", "embed->L0H1.q")
    assert str(found) == "circuit of 3 of 82 edges\n  L0H1.q <- embed\n  logits <- embed, L0H1"
    assert repr(found) == "Circuit(3 of 82 edges, model='')"


def _on_a_path(circuit):
    """Returns the edges on paths from `embed` to `logits`, each path walked."""
    found = set()

    def walk(sender, path):
        for edge in circuit.edges:
            if edge.sender == sender:
                if edge.receiver.name == "logits":
                    found.update([*path, edge])
                for part in circuit.graph.senders:
                    if edge.receiver in circuit.graph.inputs_of(part):
                        walk(part, [*path, edge])

    walk(circuit.graph.node("embed"), [])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_pruning_leaves_what_is_on_a_path(seed):
    circuit = Circuit.random(GRAPH, 40, seed)
    assert circuit.pruned().edges == _on_a_path(circuit)
    assert 0 < circuit.pruned().n_edges < 40


def test_a_shared_key_goes_on_to_each_head_that_shares_it():
    kept = circuit_of("embed->L0H2-3.k", "L0H3->logits", "embed->L0H0-1.k")
    assert [edge.name for edge in kept.pruned()] == ["embed->L0H2-3.k", "L0H3->logits"]


def test_a_file_gives_the_circuit_back(tmp_path, bridge):
    circuit = Circuit.of(bridge, ["embed->L1H0-3.k", "L1H2->logits"])
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == circuit
    data = json.loads(circuit.to_json())
    assert data["edges"] == ["embed->L1H0-3.k", "L1H2->logits"]
    assert data["model"] == bridge.cfg.model_name


def test_mistakes_are_named(bridge):
    with pytest.raises(InvalidArgumentError, match=r"there is no edge 'L1H0->L0H1\.q'"):
        circuit_of("L1H0->L0H1.q")
    with pytest.raises(InvalidArgumentError, match="there is no node 'L9H0'"):
        "L9H0->logits" in circuit_of()  # noqa: B015
    with pytest.raises(
        InvalidArgumentError, match="this is no circuit\n  expected: JSON of the format 'clearspan circ"
    ):
        Circuit.from_json("{}")
    for text in ("not JSON", '{"format": "clearspan circuit 1", "graph": {"layers": 2}}'):
        with pytest.raises(InvalidArgumentError, match="this is no circuit"):
            Circuit.from_json(text)
    with pytest.raises(InvalidArgumentError, match="a circuit combines with a circuit"):
        circuit_of() | {"L0H1->logits"}
    with pytest.raises(InvalidArgumentError, match="no circuit has 83 edges\n  expected: 0 to 82"):
        Circuit.random(GRAPH, 83)
    with pytest.raises(InvalidArgumentError, match="graph= is a ComputationalGraph"):
        Circuit.random(bridge, 3)
    with pytest.raises(InvalidArgumentError, match="seed='x'"):
        Circuit.random(GRAPH, 3, "x")
    with pytest.raises(InvalidArgumentError, match="the circuits are of different graphs"):
        circuit_of() | Circuit.of(bridge, [])
    with pytest.raises(InvalidArgumentError, match="there is no edge"):
        Circuit(ComputationalGraph(1, 1, 1), frozenset(circuit_of("L1H0->logits").edges))


def test_scores_give_the_best_edges(bridge, runs):
    scores = edge_attribution(bridge, *runs, METRIC)
    best = Circuit.of_scores(scores, n_edges=5)
    assert best.edges == set(scores.best(5))
    least = min(abs(scores.score(edge)) for edge in best)
    assert Circuit.of_scores(scores, threshold=least) == best
    assert Circuit.of_scores(scores, n_edges=0).n_edges == 0
    with pytest.raises(InvalidArgumentError, match="expected: one of n_edges= and threshold=\n  got: n_edges=None"):
        Circuit.of_scores(scores)
    with pytest.raises(InvalidArgumentError, match="threshold='x'"):
        Circuit.of_scores(scores, threshold="x")
    with pytest.raises(InvalidArgumentError, match="scores= is what edge_attribution returns"):
        Circuit.of_scores(best, n_edges=5)


def test_random_circuits_are_drawn_by_their_seed():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert Circuit.random(GRAPH, 9, seed=1) == Circuit.random(GRAPH, 9, seed=1) != Circuit.random(GRAPH, 9, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert Circuit.random(GRAPH, GRAPH.n_edges) == circuit_of().complement()


# --- runs ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("variant", "padding"), CASES)
def test_each_edge_carries_what_it_should(variant, padding):
    bridge = clearspan.boot(build(variant))
    pair = pair_of(padding)
    clean, corrupted = laid_alike(bridge, pair)
    nothing = Circuit.of(bridge, [])
    every = nothing.graph.n_edges
    some = [Circuit.random(nothing.graph, size, seed) for seed, size in enumerate((every // 2, every * 9 // 10))]
    circuits = {"all": nothing.complement(), "none": nothing, "first": some[0], "second": some[1]}
    found = evaluate_circuits(bridge, *pair, METRIC, circuits)
    runs = [bridge(clean), bridge(corrupted), *(logits_of_circuit(bridge, one, clean, corrupted) for one in some)]
    expected = torch.stack([METRIC(logits, clean) for logits in runs])
    own, rest = found.of()
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.sources["clean"]["logit difference"], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.base["logit difference"], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own[:2], expected[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest[:2], expected[:2].flip(0), rtol=1e-5, atol=1e-5)
    assert (own[2] - own[3]).abs().min() > 1e-3


def test_batches_do_not_change_what_is_found(bridge, runs):
    """Circuits next to each other share the layers in which they agree."""
    whole = Circuit.of(bridge, []).complement()
    circuits = [whole.without(edge) for edge in list(whole)[::9]]
    one, many = (CircuitRuns.of(bridge, *runs, METRIC, memory=memory) for memory in (1, None))
    torch.testing.assert_close(one.metrics(*circuits), many.metrics(*circuits), rtol=1e-4, atol=1e-5)
    assert (one.n_circuits, one.n_forwards) == (len(circuits), len(circuits))
    assert many.n_forwards < many.n_circuits == len(circuits)


def test_edges_off_every_path_change_nothing(bridge, runs):
    circuit = Circuit.random(ComputationalGraph.of(bridge), 60, seed=1)
    assert circuit.pruned().n_edges < 60
    found = evaluate_circuits(bridge, *runs, METRIC, {"all": circuit, "pruned": circuit.pruned()})
    torch.testing.assert_close(*found.of()[0], rtol=1e-5, atol=1e-5)


def test_shares_are_of_means_over_rows(bridge, runs):
    circuit = Circuit.random(ComputationalGraph.of(bridge), 100, seed=2)
    found = evaluate_circuits(bridge, *runs, METRIC, circuit)
    name = "logit difference"
    clean, corrupted = found.sources["clean"][name].mean(), found.base[name].mean()
    own, rest = found.of()[:, 0].mean(-1)
    torch.testing.assert_close(found.faithfulness[0], (own - corrupted) / (clean - corrupted))
    torch.testing.assert_close(found.completeness[0], (rest - corrupted) / (clean - corrupted))
    table = found.to_dataframe()
    assert list(table) == ["run", "circuit", name, "change", "share", "standard error"]
    assert str(found).startswith("runs of circuits: logit difference (")
    assert [len(row) for row in found.plot().data[0].z] == [1, 1]


FUNCTIONS = [lambda logits: logits[:, -1, 7], lambda logits: logits.mean()]


@pytest.mark.parametrize("metric", [KLDivergence("clean"), *FUNCTIONS])
def test_other_metrics(metric, bridge, runs):
    found = evaluate_circuits(bridge, *runs, metric, Circuit.of(bridge, []).complement())
    torch.testing.assert_close(found.faithfulness, torch.ones(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.completeness, torch.zeros(1), rtol=1e-4, atol=1e-4)
    if isinstance(metric, KLDivergence):
        torch.testing.assert_close(found.sources["clean"]["kl divergence"], torch.zeros(2), rtol=0, atol=1e-6)


def test_half_precision(runs):
    bridge = clearspan.boot(build("llama").to(torch.bfloat16))
    found = evaluate_circuits(bridge, *runs, METRIC, Circuit.of(bridge, []).complement())
    own, rest = found.of()[:, 0]
    torch.testing.assert_close(own, found.sources["clean"]["logit difference"], rtol=0.03, atol=0.06)
    torch.testing.assert_close(rest, found.base["logit difference"], rtol=0.03, atol=0.06)


def test_what_cannot_be_run_is_said(bridge, runs):
    with pytest.raises(InvalidArgumentError, match="the metric is the same in the clean and the corrupted run"):
        evaluate_circuits(bridge, runs[0], runs[0], METRIC, Circuit.of(bridge, []))
    with pytest.raises(InvalidArgumentError, match="the circuit is of another graph"):
        evaluate_circuits(bridge, *runs, METRIC, circuit_of())
    with pytest.raises(InvalidArgumentError, match="there is no circuit to evaluate"):
        evaluate_circuits(bridge, *runs, METRIC, {})
    for circuits in ("all", ["embed->logits"], {"one": "embed->logits"}):
        with pytest.raises(InvalidArgumentError, match="circuits= is a Circuit, or several by name"):
            evaluate_circuits(bridge, *runs, METRIC, circuits)
    for memory in (0, 2.5, "all"):
        with pytest.raises(InvalidArgumentError, match=f"memory={memory!r}"):
            evaluate_circuits(bridge, *runs, METRIC, Circuit.of(bridge, []), memory=memory)
    with pytest.raises(InvalidArgumentError, match="the metric is a function of logits"):
        evaluate_circuits(bridge, *runs, {"one": METRIC}, Circuit.of(bridge, []))
    post_norm = clearspan.boot(build("opt post-norm"))
    with pytest.raises(InvalidArgumentError, match="is not the sum of what its parts write"):
        evaluate_circuits(post_norm, *runs, METRIC, circuit_of())


# --- curves ----------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_the_circuits(bridge, runs):
    scores = edge_attribution(bridge, *runs, METRIC)
    sizes = (0, 7, 60, scores.graph.n_edges)
    found = faithfulness_curve(scores, sizes, draws=2, seed=5)
    own = {str(size): Circuit.of_scores(scores, n_edges=size) for size in sizes}
    expected = evaluate_circuits(bridge, *runs, METRIC, own)
    torch.testing.assert_close(found.faithfulness, expected.faithfulness, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.completeness, expected.completeness, rtol=1e-4, atol=1e-4)
    random = {str(seed): Circuit.random(scores.graph, 60, seed) for seed in (5, 6)}
    control = evaluate_circuits(bridge, *runs, METRIC, random).faithfulness
    torch.testing.assert_close(found.random[:, 2], control, rtol=1e-4, atol=1e-4)
    assert found.axes["run"] == ("circuit", "the rest", "random 0", "random 1")
    assert found.title.startswith("circuits by EAP: logit difference (")
    figure = found.plot()
    assert [line.name for line in figure.data] == list(found.axes["run"])
    assert figure.layout.xaxis.type == "log"


def test_curves_without_a_control(bridge, runs):
    scores = edge_attribution(bridge, *runs, METRIC)
    found = faithfulness_curve(scores, [3], draws=0)
    assert found.axes == {"run": ("circuit", "the rest"), "edges": (3,)}
    assert found.random.shape == (0, 1)
    for sizes, message in (
        ([9999], "no circuit has 9999 edges"),
        ([], r"sizes=\[\]"),
        (2.5, "sizes=2.5"),
        ([-1], "n_edges=-1"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            faithfulness_curve(scores, sizes)
    for given in ({"draws": -1}, {"seed": 0.5}, {"scores": "EAP"}):
        with pytest.raises(InvalidArgumentError, match=next(iter(given))):
            faithfulness_curve(**{"scores": scores, **given})


# --- drawings --------------------------------------------------------------------------------------------------------


def test_a_drawing_has_all_parts_and_edges():
    circuit = circuit_of("embed->L0.mlp", "L0.mlp->L1H2-3.k", "embed->L1H2.q", "L1H2->logits")
    effects = dict(zip(circuit, (1.0, -0.5, 0.25, 0.1), strict=True))
    figure, picture = circuit.plot(effects), circuit.to_svg(effects)
    assert set(figure.data[0].text) == {"embed", "MLP 0", "L1 keys", "L1H2", "logits"}
    assert set(figure.data[1].text) == {f"{edge}: {effect:.3f}" for edge, effect in effects.items()}
    paths = [shape for shape in figure.layout.shapes if shape.type == "path"]
    assert len(paths) == picture.count('<path d="M') - 4 == 5  # four lines of the legend; one link from keys to a head
    widths = {shape.line.width for shape in paths if shape.line.dash != "dot"}
    assert max(widths) == pytest.approx(8.2)
    assert [shape.line.dash for shape in paths].count("dash") == 1
    assert "<title>L1H2-&gt;logits: 0.100</title>" in picture


def test_a_drawing_without_effects_and_one_of_nothing():
    circuit = circuit_of("embed->logits")
    assert circuit.plot().layout.title.text == "Circuit(1 of 82 edges, model='')"
    assert circuit.plot(title="found").layout.title.text == "found"
    assert circuit_of().to_svg().startswith("<svg ")
