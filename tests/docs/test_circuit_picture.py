"""The picture of the induction circuit is drawn from its figures, and the figures are computed again."""

import json
import runpy
from pathlib import Path

import pytest

from clearspan.analysis import Circuit, evaluate_circuits

DRAW = runpy.run_path(str(Path(__file__).parents[2] / "docs/draw_circuit.py"))
KEPT = json.loads(DRAW["FIGURES"].read_text())
CIRCUIT = Circuit.from_json(json.dumps(KEPT["circuit"]))
ERROR = 2e-3
"""Figures are kept to three decimals."""


def test_the_picture_is_drawn_from_the_figures():
    assert DRAW["picture"](KEPT) == DRAW["PICTURE"].read_text(), "run: python docs/draw_circuit.py"


def test_the_figures_are_what_runs_give(embedded):
    clean, corrupted = DRAW["texts"](embedded)
    without = {edge.name: CIRCUIT.without(edge) for edge in CIRCUIT}
    circuits = {"all": CIRCUIT, **without}
    found = evaluate_circuits(embedded, clean.tokens, corrupted.tokens, clean.second_copy_loss, circuits)
    whole, *others = found.faithfulness.tolist()
    assert whole == pytest.approx(KEPT["faithfulness"], abs=ERROR)
    assert float(found.completeness[0]) == pytest.approx(KEPT["completeness"], abs=ERROR)
    effects = dict(zip(without, (whole - other for other in others), strict=True))
    assert effects == pytest.approx(KEPT["effects"], abs=ERROR)


@pytest.mark.slow
def test_the_circuit_is_what_discovery_finds(embedded):
    """Up to edges at the limit of what may go, which rounding may decide."""
    found = DRAW["found"](embedded)
    assert len(found.circuit.edges ^ CIRCUIT.edges) <= 3
    assert found.faithfulness >= 0.9
