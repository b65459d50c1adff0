"""What the server answers: the library's numbers, shared, cancelled, and kept."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.pages import OTHER, TEXT, Page, read_answer

import clearspan
from clearspan.analysis import lens_readings
from clearspan.interventions import Zero
from clearspan.workbench import Workbench

LONG = "def area(self, width, height):\n    return self.width * self.height"


def sweep_of(page: Page, text: str = LONG) -> dict[str, object]:
    """Returns a request of many cells, in batches of a few."""
    clean, corrupted = page.tokens(text), page.tokens(text.replace("width", "name"))
    request = {"view": "patching", "clean": clean, "corrupted": corrupted, "answer_token": 5, "memory": 1}
    return {**request, "point": "z", "by": ["layer", "position", "head"], "layers": [3, 4], "positions": [5, 9, 13]}


def test_a_lens_is_the_librarys(page: Page, bridge: clearspan.TransformerBridge) -> None:
    ablated = clearspan.Intervention("z", Zero(), layer=1, heads=3)
    job = page.ended(view="lens", prompt=page.tokens(TEXT), interventions=[ablated.to_json()])
    facts, tensors = page.answer(job["key"])
    with bridge.hooks(interventions=[ablated]):
        found = lens_readings(bridge, TEXT, positions=None)
    assert job["state"] == "done"
    assert np.array_equal(tensors["entropy"], found.entropy.numpy())
    assert np.array_equal(tensors["top_ids"], found.top_ids.numpy())
    assert facts["depths"] == list(found.depths)


def test_tokens_are_read_as_the_model_reads_them(page: Page, bridge: clearspan.TransformerBridge) -> None:
    found = page.http.post("/api/tokens", json={"text": TEXT}).json()
    assert found["tokens"] == bridge.to_tokens(TEXT)[0].tolist()
    assert found["labels"][2:4] == ["·os", "⏎"]
    assert page.http.post("/api/token", json={"text": " os"}).json() == {"token": found["tokens"][2]}


def test_the_model_is_told(page: Page, bridge: clearspan.TransformerBridge) -> None:
    facts = page.http.get("/api/model").json()
    assert (facts["layers"], facts["heads"], facts["has_tokenizer"]) == (5, 8, True)
    assert [point["name"] for point in facts["points"]] == [row.name for row in bridge.points()]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/api/jobs", "{", 400, "this is no JSON"),
        ("/api/jobs", "[]", 422, "this is no request"),
        ("/api/jobs", '{"client": "a", "request": {"view": "exec"}}', 422, "unknown view 'exec'"),
        ("/api/jobs", '{"client": "a", "request": {"view": "lens", "code": "1"}}', 422, "this is no request for lens"),
        ("/api/tokens", '{"text": ""}', 422, "empty"),
        ("/api/token", '{"text": "two words"}', 422, "single token"),
    ],
)
def test_what_is_no_request_is_told(page: Page, path: str, body: str, status: int, said: str) -> None:
    answer = page.http.post(path, content=body)
    assert answer.status_code == status
    assert said in answer.text


def test_what_is_not_there_is_not_found(page: Page) -> None:
    for path in ("none/answer", "none/script", "..%2f..%2fpage/answer"):
        assert page.http.get(f"/api/jobs/{path}").status_code == 404
    key = page.ended(view="text", prompt=page.tokens(TEXT))["key"]
    assert page.http.get(f"/api/jobs/{key}/exe").status_code == 404


def test_a_failure_is_told_and_the_next_request_is_answered(page: Page) -> None:
    broken = page.ended(view="text", prompt={"tokens": [10**6], "text": ""})
    unknown = {"point": "resid_pre", "layer": 0, "action": {"kind": "apply", "function": "os.system"}}
    refused = page.ended(view="text", prompt=page.tokens(TEXT), interventions=[unknown])
    assert broken["state"] == refused["state"] == "failed"
    assert "vocabulary" in broken["error"]
    assert "no function is registered as 'os.system'" in refused["error"]
    assert page.ended(view="text", prompt=page.tokens(TEXT))["state"] == "done"


def test_an_answer_is_computed_once(page: Page) -> None:
    first = page.ended(view="text", prompt=page.tokens(TEXT))
    again = page.submit(view="text", prompt={**page.tokens(TEXT), "text": "shown otherwise"})
    assert (again["key"], again["state"], again["made"]) == (first["key"], "done", first["made"])


def test_a_map_fills_and_a_cancelled_one_goes_on(page: Page, bridge: clearspan.TransformerBridge) -> None:
    request = sweep_of(page)
    key = page.submit(**request)["key"]
    page.until(key, lambda job: job["done"] >= 2)
    _, begun = page.answer(key)
    page.cancel(key)
    stopped = page.until(key, lambda job: job["state"] == "cancelled")
    assert 0 < begun["done"].sum() < begun["done"].size
    assert np.isnan(begun["mean"].flatten()[~begun["done"]]).all()
    whole = page.ended(**request)
    _, found = page.answer(key)
    assert whole["total"] < stopped["total"] == begun["done"].size
    metric = clearspan.sweep.LogitDifference(5)
    clean, corrupted = request["clean"]["tokens"], request["corrupted"]["tokens"]
    places = {"layer": [3, 4], "position": [5, 9, 13]}
    own = clearspan.patching.activation_patching(bridge, [clean], [corrupted], metric, "z", request["by"], **places)
    np.testing.assert_allclose(found["mean"], own.mean().numpy(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def held(page: Page) -> Iterator[threading.Event]:
    """Keeps the model's thread busy until it is set, or the test ends."""
    found = threading.Event()
    page.workbench.worker.ask(lambda _: found.wait())
    yield found
    found.set()


def test_a_job_of_two_clients_stops_when_both_take_it_back(page: Page, visit, held: threading.Event) -> None:
    other = visit(page.workbench, "two")
    request = {"view": "text", "prompt": {"tokens": [1, 2], "text": ""}}
    key = page.submit(**request)["key"]
    assert other.submit(**request)["key"] == key
    with other.http.stream("GET", "/api/events", params={"client": "two"}) as stream:
        lines = stream.iter_lines()
        next(lines)
        page.cancel(key)
        assert not page.workbench.worker.jobs[key].stop.is_set()
        other.cancel(key)
    held.set()
    assert page.until(key, lambda job: job["state"] not in ("waiting", "running"))["state"] == "cancelled"
    assert page.http.get(f"/api/jobs/{key}/answer").status_code == 404


def test_a_client_that_has_gone_keeps_no_job_alive(page: Page, visit, held: threading.Event) -> None:
    request = {"view": "text", "prompt": {"tokens": [1, 3], "text": ""}}
    key = page.submit(**request)["key"]
    visit(page.workbench, "closed").submit(**request)
    page.cancel(key)
    held.set()
    assert page.until(key, lambda job: job["state"] != "waiting")["state"] == "cancelled"


def test_whoever_connects_is_told_all(page: Page, visit) -> None:
    done = page.ended(view="text", prompt=page.tokens(TEXT))
    late = visit(page.workbench, "late")
    assert late.until(done["key"], lambda _: True) == done


def test_both_forms_of_a_view_are_written(page: Page) -> None:
    key = page.ended(view="lens", prompt=page.tokens(TEXT))["key"]
    script = page.http.get(f"/api/jobs/{key}/script").text
    cells = page.http.get(f"/api/jobs/{key}/notebook").json()["cells"]
    assert script == "\n".join([cells[1]["source"], cells[2]["source"], ""])


def test_a_session_is_opened_again(page: Page, visit, opened, tmp_path: Path) -> None:
    desk = {"clean": TEXT, "corrupted": OTHER, "chips": [{"intervention": ZERO, "is_on": False}]}
    assert page.http.put("/api/desk", json=desk).json() == desk
    job = page.ended(view="text", prompt=page.tokens(TEXT))
    content = page.http.get(f"/api/jobs/{job['key']}/answer").content
    again = visit(opened(tmp_path))
    assert again.http.get("/api/desk").json() == desk
    assert again.until(job["key"], lambda _: True)["made"] == job["made"]
    assert again.http.get(f"/api/jobs/{job['key']}/answer").content == content


ZERO = clearspan.Intervention("z", Zero(), layer=1, heads=3).to_json()


def test_a_desk_is_data_of_its_form(page: Page) -> None:
    for given in ({}, {"clean": 1, "corrupted": "", "chips": []}, {"clean": "", "corrupted": "", "chips": [ZERO]}):
        assert page.http.put("/api/desk", json=given).status_code == 422


def test_other_weights_do_not_get_the_answers(page: Page, tmp_path: Path) -> None:
    page.ended(view="text", prompt=page.tokens(TEXT))
    other = clearspan.boot("tiny-bigcode")
    next(other.parameters()).data[0, 0] += 1
    workbench = Workbench(other, "tiny-bigcode", tmp_path)
    assert not workbench.worker.jobs
    workbench.worker.close()
    workbench.socket.close()


def test_a_damaged_file_is_left_out(page: Page, opened, tmp_path: Path) -> None:
    key = page.ended(view="text", prompt=page.tokens(TEXT))["key"]
    (tmp_path / "answers" / "0bad.safetensors").write_bytes(b"damaged")
    assert list(opened(tmp_path).worker.jobs) == [key]


SERVE = """
import pathlib, sys, clearspan
from clearspan.workbench import Workbench
workbench = Workbench(clearspan.boot("tiny-bigcode"), "tiny-bigcode", pathlib.Path(sys.argv[1]))
print(workbench.address, flush=True)
workbench.serve()
"""


class Elsewhere:
    """A workbench in another process."""

    def __init__(self, folder: Path) -> None:
        given = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVE, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given)
        self.address = self.process.stdout.readline().strip()


def test_a_killed_server_loses_nothing_that_was_finished(visit, opened, tmp_path: Path) -> None:
    elsewhere = Elsewhere(tmp_path)
    page = visit(elsewhere)
    try:
        finished = page.ended(view="text", prompt=page.tokens(TEXT))
        request = sweep_of(page)
        key = page.submit(**request)["key"]
        page.until(key, lambda job: job["done"] >= 3)
    finally:
        elsewhere.process.send_signal(signal.SIGKILL)
        elsewhere.process.wait()
        elsewhere.process.stdout.close()
    again = visit(opened(tmp_path))
    jobs = again.workbench.worker.jobs
    assert {one.key: one.state for one in jobs.values()} == {finished["key"]: "done", key: "cancelled"}
    _, begun = again.answer(key)
    assert begun["done"].sum() >= 3
    resumed = again.ended(**request)
    assert resumed["state"] == "done"
    assert resumed["total"] == (~begun["done"]).sum()
    _, found = again.answer(key)
    np.testing.assert_array_equal(found["mean"].flatten()[begun["done"]], begun["mean"].flatten()[begun["done"]])


def test_an_answer_is_a_file_of_safetensors(page: Page, tmp_path: Path) -> None:
    key = page.ended(view="attention", prompt=page.tokens(TEXT), layer=2)["key"]
    facts, tensors = read_answer((tmp_path / "answers" / f"{key}.safetensors").read_bytes())
    assert facts["layer"] == 2
    assert tensors["pattern"].shape == (8, 5, 5)
    assert json.loads(page.http.get("/api/desk").text)["chips"] == []
