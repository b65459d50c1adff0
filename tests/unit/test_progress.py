import inspect
import os
import subprocess
import sys

import pytest

from clearspan import TransformerBridge, analysis, circuits, patching, sweep, zoo
from clearspan.errors import InvalidArgumentError
from clearspan.progress import shown, silent

CODE = """
import sys
from clearspan.progress import shown
with shown(eval(sys.argv[1])) as tell:
    for done in range(1, 4):
        tell("reading texts", done, 3)
"""


def written(progress, **environment):
    """Returns what is on standard error; `FORCE_COLOR` makes it a terminal to rich."""
    known = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, progress],
        capture_output=True,
        text=True,
        check=True,
        env={**known, "TERM": "xterm", **environment},
    )
    assert done.stdout == ""
    return done.stderr


def test_a_bar_is_shown_on_a_terminal_alone():
    assert "reading texts" in written("True", FORCE_COLOR="1")
    assert written("True") == written("False") == written("False", FORCE_COLOR="1") == ""


def test_a_function_is_told_and_an_error_passes_through():
    steps = []
    with pytest.raises(RuntimeError), shown(lambda *step: steps.append(step)) as tell:
        tell("reading", 1, 2)
        raise RuntimeError
    assert steps == [("reading", 1, 2)]
    with shown(False) as tell:
        assert tell is silent


@pytest.mark.parametrize("wrong", [None, 1, "yes", []])
def test_what_shows_nothing_raises(wrong):
    with pytest.raises(InvalidArgumentError, match="progress="), shown(wrong):
        pass


# --- who has it ------------------------------------------------------------------------------------------------------

LONG = {
    "activation_patching",
    "ablate_heads",
    "ablate_layers",
    "ablate_neurons",
    "attribution_patch",
    "causal_effect",
    "check_all",
    "discover_circuit",
    "edge_attribution",
    "evaluate_circuits",
    "faithfulness_curve",
    "fit_alignment",
    "fit_jacobian_lens",
    "interchange_sweep",
    "patch_edges",
    "patchscope",
    "path_patching",
    "report",
    "Sweep.run",
    "steering_sweep",
    "train_probe",
    "train_sparse_probe",
    "train_tuned_lens",
    "verify",
}
"""Sweeps, training, fits, discovery, verification, and attribution over many runs; and whatever has a `batch_size`."""


def public():
    """Yields the public functions and methods by name."""
    yield "verify", TransformerBridge.verify
    for module in (analysis, circuits, patching, sweep, zoo):
        for name in module.__all__:
            one = getattr(module, name)
            if inspect.isfunction(one):
                yield name, one
            elif inspect.isclass(one):
                own = ((f"{name}.{each}", static) for each, static in vars(one).items() if not each.startswith("_"))
                yield from ((each, static) for each, static in own if inspect.isfunction(static))


def test_every_long_function_takes_progress_and_shows_it_by_default():
    found = set()
    for name, function in public():
        parameters = inspect.signature(function).parameters
        if name in LONG or "batch_size" in parameters:
            assert "progress" in parameters, name
            assert parameters["progress"].default is True, name
            assert parameters["progress"].kind is inspect.Parameter.KEYWORD_ONLY, name
            found.add(name)
    assert found > LONG


def test_what_runs_part_by_part_tells_how_far_it_is(embedded):
    texts, steps = ["import os", "import re", "x = 1"], []
    analysis.predictions(embedded, texts, batch_size=1, progress=lambda *step: steps.append(step))
    analysis.loss_by_position(embedded, texts, batch_size=2, progress=lambda *step: steps.append(step))
    analysis.max_activating_examples(
        embedded, texts, "blocks.0.mlp.hook_post", index=0, batch_size=2, progress=lambda *step: steps.append(step)
    )
    assert steps[:3] == [("predictions", done, 3) for done in (1, 2, 3)]
    assert steps[3:5] == [("pieces", 1, 2), ("pieces", 2, 2)]
    assert steps[5:] == [("texts", 2, 0), ("texts", 3, 0)]
    steps.clear()
    embedded.verify(progress=lambda *step: steps.append(step))
    assert steps[0][0] == "verify structure"
    assert steps[-1][1] <= steps[-1][2]
