"""Views: their JSON, and the Python that gives the same numbers."""

import contextlib
import io
import json
from typing import Any

import nbformat
import pytest
import torch
from tests.pages import OTHER, TEXT
from torch import Tensor

import clearspan
from clearspan.errors import InvalidArgumentError
from clearspan.interventions import Add, Scale, Zero
from clearspan.workbench.scripts import notebook
from clearspan.workbench.views import (
    Answer,
    AttentionView,
    AttributionView,
    GenerationView,
    LensView,
    PatchingView,
    Prompt,
    TextView,
    VerificationView,
    View,
    parse_view,
)

CLEAN, CORRUPTED = Prompt((0, 580, 522, 199, 580), TEXT), Prompt((0, 580, 316, 199, 580), OTHER)
CHIPS = (
    clearspan.Intervention("z", Zero(), layer=1, heads=3),
    clearspan.Intervention("mlp_out", Scale(0.5), layer=-1, positions=slice(1, None)),
)
STEERING = clearspan.Intervention("resid_pre", Add([1.0] * 256), layer=2, every_step=True)
VIEWS = [
    TextView(CLEAN),
    TextView(CLEAN, top=3, interventions=CHIPS),
    LensView(CLEAN),
    LensView(CLEAN, interventions=CHIPS),
    AttentionView(CLEAN, 2),
    AttentionView(CLEAN, 2, CHIPS),
    AttributionView(CLEAN, answer_token=522, incorrect_token=316),
    AttributionView(CLEAN, answer_token=522, unit="head", position=2, interventions=CHIPS),
    PatchingView(CLEAN, CORRUPTED, 522, 316),
    PatchingView(CLEAN, CORRUPTED, 522, point="z", by=("layer", "head"), direction="noising", interventions=CHIPS),
    PatchingView(CLEAN, CORRUPTED, 522, layers=(1, 2), positions=(2,), memory=10**6),
    GenerationView(CLEAN, 4),
    GenerationView(CLEAN, 4, interventions=(STEERING,)),
    VerificationView(),
]


class Silent:
    begun = None

    def tell(self, stage: str, done: int, total: int) -> None:
        pass

    def show(self, answer: Answer) -> None:
        pass


def numbers(view: View, found: Any) -> dict[str, Tensor]:
    """Returns what a script found by the names that an answer has."""
    match view:
        case TextView():
            return {"probability": found.token_probs, "top_probability": found.top_probs}
        case LensView():
            return {"kl": found.kl, "top_log_probability": found.top_log_probs, "entropy": found.entropy}
        case AttentionView():
            return {"pattern": found}
        case AttributionView():
            return {"logits": found.attribution}
        case PatchingView():
            return {"mean": found.mean(), "share": found.normalised()}
        case GenerationView():
            return {"tokens": found.to(torch.int32)}
    return {}


def executed(source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(source, found)
    assert printed.getvalue().strip()
    return found


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.kind)
def test_the_script_gives_the_same_numbers(view: View, bridge: clearspan.TransformerBridge, monkeypatch) -> None:
    shown = view.run(bridge, Silent())
    monkeypatch.setattr(clearspan, "boot", lambda _: bridge)
    found = executed(view.script("tiny-bigcode"))["found"]
    for name, own in numbers(view, found).items():
        torch.testing.assert_close(shown.tensors[name], own, rtol=0, atol=0, equal_nan=True, msg=name)
    if isinstance(view, VerificationView):
        assert shown.facts["verification"] == found.to_dict()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.kind)
def test_a_view_is_its_json(view: View) -> None:
    assert parse_view(json.loads(json.dumps(view.to_json()))) == view


def test_a_script_boots_the_model_that_was_opened() -> None:
    source = TextView(CLEAN).script("tiny-bigcode")
    assert source.startswith("import clearspan\n\nbridge = clearspan.boot('tiny-bigcode')\n")
    executed(source)


def test_text_cannot_become_code() -> None:
    source = TextView(Prompt((0,), "x\nraise SystemExit # \u2028raise")).script("a'); raise SystemExit('")
    lines = source.splitlines()
    assert lines[2] == """bridge = clearspan.boot("a'); raise SystemExit('")"""
    assert lines[3] == r"prompt = [[0]]  # 'x\nraise SystemExit # \u2028raise'"


def test_a_notebook_is_one(bridge: clearspan.TransformerBridge) -> None:
    made = notebook(LensView(CLEAN, interventions=CHIPS), "tiny-bigcode")
    nbformat.validate(nbformat.from_dict(made))
    found = executed("\n".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "code"))
    assert isinstance(found["found"], clearspan.analysis.LensReadings)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "this is no request"),
        ({"view": "nothing"}, "unknown view 'nothing'"),
        ({"view": "lens"}, "this is no request for lens"),
        ({"view": "lens", "prompt": {"tokens": []}}, "this is no prompt"),
        ({"view": "lens", "prompt": {"tokens": [], "text": ""}}, "a prompt has token ids"),
        ({"view": "lens", "prompt": {"tokens": ["a"], "text": ""}}, "a prompt has token ids"),
        ({"view": "lens", "prompt": {"tokens": [1], "text": "", "code": ""}}, "this is no request for lens"),
        ({"view": "lens", "prompt": {"tokens": [1], "text": ""}, "top": 0}, "top=0"),
        ({"view": "lens", "prompt": {"tokens": [1], "text": ""}, "interventions": [{}]}, "this is no intervention"),
        ({"view": "attention", "prompt": {"tokens": [1], "text": ""}, "layer": "0"}, "layer='0'"),
    ],
)
def test_what_is_no_request_says_why(data: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        parse_view(data)


def test_the_plan_of_a_sweep_is_shown_before_its_map(bridge: clearspan.TransformerBridge) -> None:
    shown: list[Answer] = []

    class Watching(Silent):
        def show(self, answer: Answer) -> None:
            shown.append(answer)

    found = PatchingView(CLEAN, CORRUPTED, 522, memory=1).run(bridge, Watching())
    counts = [int(one.tensors["done"].sum()) if one.tensors else 0 for one in shown]
    assert shown[0].facts["plan"].startswith("25 cells in ")
    assert counts == sorted(counts)
    assert 0 == counts[0] < counts[1] < counts[-1] == int(found.tensors["done"].sum()) == 25


def test_no_random_number_is_drawn(bridge: clearspan.TransformerBridge) -> None:
    before = torch.random.get_rng_state()
    for view in VIEWS[:-1]:
        view.run(bridge, Silent())
    assert torch.equal(torch.random.get_rng_state(), before)
