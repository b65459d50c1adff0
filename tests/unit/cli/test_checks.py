"""`clearspan verify` and `clearspan zoo`."""

from tests.unit.cli.running import as_json, printed, refused, run


def test_the_version_is_printed():
    assert printed("--version").startswith("clearspan 0.")


def test_verification_as_json_is_alone_on_stdout_and_in_the_file(tmp_path):
    out = tmp_path / "verification.json"
    data = as_json(printed("verify", "tiny-bigcode", "--json", "--out", str(out)))
    assert data["passed"] is True
    assert data == as_json(out.read_text(encoding="utf-8"))


def test_the_zoo_as_json_is_alone_on_stdout():
    data = as_json(
        printed("zoo", "--type", "gpt2", "--type", "gemma4_assistant", "--level", "quick", "--json", "-p", "1")
    )
    assert data["passed"] is True
    assert [row["outcome"] for row in data["rows"]] == ["passes", "not built"]


def test_the_zoo_in_a_table():
    text = printed("zoo", "--type", "gemma4_assistant", "-p", "1")
    assert "not built" in text
    assert "0 of 1 model types of transformers" in text


def test_a_zoo_in_which_something_fails(monkeypatch):
    monkeypatch.setattr("clearspan.zoo.models.MOST_PARAMETERS", 1000)
    result = run("zoo", "--type", "gpt2", "-p", "1")
    assert result.exit_code == 1
    assert "its config has sizes of its own" in " ".join(result.stdout.split())


def test_zoos_that_cannot_be_asked_for():
    refused(2, "error: --level deep\n  expected: quick or full\n", "zoo", "--level", "deep")
    refused(2, "error: unknown model type 'lama'\n", "zoo", "--type", "lama")
