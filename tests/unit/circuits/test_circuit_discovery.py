from dataclasses import replace

import pytest
import torch
from tests.zoo import build

import clearspan
from clearspan.circuits import Circuit, ComputationalGraph, discover_circuit, edge_attribution, evaluate_circuits
from clearspan.circuits.evaluation import CircuitRuns
from clearspan.circuits.search import _last, _Search
from clearspan.errors import InvalidArgumentError
from clearspan.sweep import LogitDifference

METRIC = LogitDifference(3, 5)


@pytest.fixture(scope="module")
def runs():
    return torch.randint(1, 97, (2, 2, 6), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module", params=["gpt_bigcode", "llama"])
def bridge(request):
    return clearspan.boot(build(request.param))


@pytest.fixture(scope="module")
def found(bridge, runs):
    return discover_circuit(bridge, *runs, METRIC, target=0.8)


def _shares_without_each(bridge, runs, circuit):
    without = {edge.name: circuit.without(edge) for edge in circuit}
    return evaluate_circuits(bridge, *runs, METRIC, without).faithfulness


def test_the_circuit_does_what_is_said(bridge, runs, found):
    again = evaluate_circuits(bridge, *runs, METRIC, found.circuit)
    assert abs(found.faithfulness - 1) <= 0.2 + 1e-6
    assert found.faithfulness == pytest.approx(float(again.faithfulness), abs=1e-4)
    assert found.completeness == pytest.approx(float(again.completeness), abs=1e-4)
    assert found.circuit == found.circuit.pruned()
    assert found.circuit.n_edges < found.circuit.graph.n_edges / 2


def test_no_edge_can_be_dropped(bridge, runs, found):
    shares = _shares_without_each(bridge, runs, found.circuit)
    assert ((shares - 1).abs() > 0.2 - 1e-4).all()
    effects = torch.tensor(list(found.effects.values()))
    torch.testing.assert_close(effects, found.faithfulness - shares, rtol=1e-3, atol=1e-4)
    assert list(found.effects) == list(found.circuit)


def test_edges_of_some_effect_stay(bridge, runs, found):
    kept = discover_circuit(bridge, *runs, METRIC, target=0.8, tolerance=0.02, scores=found.scores)
    shares = _shares_without_each(bridge, runs, kept.circuit)
    may_go = ((shares - 1).abs() < 0.2 - 1e-4) & ((shares - kept.faithfulness).abs() < 0.02 - 1e-4)
    assert not may_go.any()
    assert kept.circuit.n_edges > found.circuit.n_edges


def test_the_least_effects_are_dropped_first(bridge, runs, found):
    search = _Search(CircuitRuns.of(bridge, *runs, METRIC), found.scores, 0.8, None)
    first = Circuit.of(bridge, found.agreement.labels)
    own = evaluate_circuits(bridge, *runs, METRIC, first)
    without = evaluate_circuits(bridge, *runs, METRIC, {edge.name: first.without(edge) for edge in first})
    dropped = search._droppable(first, list(first), own.of()[0, 0], without.of()[0])
    effects = dict(zip(first, (own.faithfulness - without.faithfulness).abs().tolist(), strict=True))
    assert 0 < len(dropped) < first.n_edges
    assert [effects[edge] for edge in dropped] == sorted(effects[edge] for edge in dropped)
    left = evaluate_circuits(bridge, *runs, METRIC, first.without(*dropped))
    assert abs(float(left.faithfulness) - 1) <= 0.2 + 1e-5


def test_the_rounds_get_smaller(found):
    sizes = [step.n_edges for step in found.history]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) > 1
    assert sizes[-1] == found.circuit.n_edges
    assert all(abs(step.faithfulness - 1) <= 0.2 + 1e-6 for step in found.history)
    assert found.history[-1].faithfulness == pytest.approx(found.faithfulness)
    assert found.n_forwards <= found.n_circuits
    assert found.n_circuits > sum(sizes)


def test_scores_are_compared_with_exact_removal(bridge, runs, found):
    agreement = found.agreement
    first = Circuit.of(bridge, agreement.labels)
    assert first.n_edges == found.history[0].n_edges
    names = agreement.labels[:5]
    changed = evaluate_circuits(bridge, *runs, METRIC, {name: first.without(name) for name in names})
    whole = evaluate_circuits(bridge, *runs, METRIC, first)
    expected = whole.mean()[0] - changed.mean()[0]
    torch.testing.assert_close(agreement.exact[:5], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(agreement.approximate[:5], torch.tensor([found.scores.score(name) for name in names]))
    assert f"Pearson {agreement.pearson:.3f}" in found.title


def test_scores_that_are_given_decide_the_order(bridge, runs, found):
    scores = edge_attribution(bridge, *runs, METRIC, steps=5)
    again = discover_circuit(bridge, *runs, METRIC, target=0.8, scores=scores)
    assert again.circuit == found.circuit
    noise = torch.rand(scores.of().shape, generator=torch.Generator().manual_seed(0))
    shuffled = replace(scores, values={"score": noise.where(scores.graph.mask[..., None], torch.nan)})
    other = discover_circuit(bridge, *runs, METRIC, target=0.8, scores=shuffled)
    assert other.history[0].n_edges > found.history[0].n_edges
    assert abs(other.faithfulness - 1) <= 0.2 + 1e-6


def test_the_result_is_a_table_and_a_drawing(found):
    table = found.to_dataframe()
    assert list(table) == ["sender", "receiver", "score", "effect"]
    assert len(table) == found.circuit.n_edges
    assert table.score[0] == pytest.approx(found.scores.score(next(iter(found.circuit))))
    assert found.plot().layout.title.text.startswith(f"{found.circuit.n_edges} edges: faithfulness ")
    assert found.to_svg() == found.circuit.to_svg(found.effects)


def test_mistakes_are_named(runs):
    bridge = clearspan.boot(build("gpt_bigcode"))
    for target in (0.0, 1.0):
        with pytest.raises(InvalidArgumentError, match=f"no circuit is sought for target={target}"):
            discover_circuit(bridge, *runs, METRIC, target=target)
    for given in ({"target": "0.9"}, {"tolerance": -1.0}, {"steps": 0}, {"scores": 3}):
        with pytest.raises(InvalidArgumentError, match=next(iter(given))):
            discover_circuit(bridge, *runs, METRIC, **given)
    scores = replace(edge_attribution(bridge, *runs, METRIC), graph=ComputationalGraph(1, 1, 1))
    with pytest.raises(InvalidArgumentError, match="the scores are of another graph"):
        discover_circuit(bridge, *runs, METRIC, scores=scores)


@pytest.mark.parametrize("edge", range(1, 9))
def test_bisection_finds_the_last_number_at_which_something_holds(edge):
    assert _last(lambda number: number < edge, 8) == edge - 1
