import pytest
import torch
from tests.unit.cli.running import TEXT, as_json, printed, refused, run
from tests.zoo import build

import clearspan
from clearspan import analysis

MODEL = "tiny-bigcode"
LONG = (
    "class Window:\n    def __init__(self, name, width, parent):\n        self.name = name\n"
    "        self.width = width\n"
    "        self.parent = parent\n\n    def rename(self, name):\n        self."
)


@pytest.fixture(scope="module")
def bridge():
    return clearspan.boot(MODEL)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint without tokenizer files, for which transformers makes up a tokenizer."""
    build("gpt2").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# --- what is printed and written -------------------------------------------------------------------------------------


def test_fifty_tokens_take_one_screen(bridge, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = printed("report", MODEL, LONG)
    assert bridge.to_tokens(LONG).numel() >= 48
    for title in ("Least expected tokens", "Logit lens", "Strongest heads", "Causal effect"):
        assert title in text
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 100
    assert "--full: everything" in text


def test_everything_is_printed_on_request(bridge):
    lines = printed("report", MODEL, LONG, "--full").splitlines()
    last = bridge.to_tokens(LONG).numel() - 1
    assert sum(line.strip().startswith(f"{last} ") for line in lines) == 3
    assert not any("--full" in line for line in lines)


def test_rows_parts_and_the_explained_token_can_be_chosen(bridge):
    found = analysis.report(bridge, TEXT, position=2, target=" x", progress=False)
    text = printed("report", MODEL, TEXT, "--position", "2", "--target", " x", "--only", "effect", "--top", "1")
    assert f"log P(·x) = {found.effect.log_prob:.3f}" in text
    drop = found.effect.drop[:, :3]
    layer, position = divmod(int(drop.abs().argmax()), 3)
    row = text.split("nats  ", 2)[-1].splitlines()[1].split()
    assert row[0] == str(position)
    assert [f"layer {layer}", f"{drop[layer, position]:+.2f}"] == [" ".join(row[-4:-2]), row[-2]]
    assert "Logit lens" not in text


def test_the_page_is_written(tmp_path, bridge):
    out = tmp_path / "report.html"
    result = run("report", "--model", MODEL, "--text", TEXT, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert f"wrote {out}" in result.stderr
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_is_alone_on_stdout_and_in_the_file(tmp_path):
    file, out = tmp_path / "text.py", tmp_path / "report.json"
    file.write_bytes(TEXT.replace("\n", "\r\n").encode())
    data = as_json(printed("report", "--file", str(file), "--json", "--out", str(out)))
    assert data == as_json(out.read_text(encoding="utf-8"))
    assert data["model"]["name"] == MODEL
    assert data["text"] == TEXT.replace("\n", "\r\n")


def test_json_has_the_parts_that_were_asked_for():
    data = as_json(printed("report", MODEL, "import os", "--only", "lens,heads", "--json"))
    assert set(data) == {"model", "text", "logit_lens", "head_scores"}


def test_one_part_is_written_as_a_table(tmp_path, bridge):
    out = tmp_path / "lens.csv"
    printed("report", MODEL, "import os", "--only", "lens", "--out", str(out))
    header, *rows = out.read_text(encoding="utf-8").splitlines()
    assert header.split(",")[:2] == ["position", "depth"]
    assert len(rows) == 3 * (bridge.cfg.n_layers + 1)
    refused(2, "a report is several tables, and .csv has one", "report", MODEL, "x", "--out", str(out))


# --- where the text comes from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(MODEL,), (MODEL, "-"), (MODEL, "-f", "-"), ("--model", MODEL), ()])
def test_a_text_is_piped_in_less_the_line_break_of_echo(arguments):
    data = as_json(printed("report", *arguments, "--json", "--only", "predictions", input="import os\n"))
    assert data["text"] == "import os"


def test_what_is_piped_in_is_left_alone_where_a_text_is_given():
    assert as_json(printed("report", MODEL, "import os", "--json", input="other"))["text"] == "import os"


def test_a_text_stands_alone_behind_the_option_for_the_model():
    assert as_json(printed("report", "--model", MODEL, "import os", "--json"))["text"] == "import os"


def test_what_is_no_text_is_refused(tmp_path):
    missing, binary, empty = tmp_path / "missing", tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"ab\xff")
    empty.touch()
    refused(2, f"error: cannot read {missing}: no such file or directory\n", "report", "--file", str(missing))
    refused(2, f"error: cannot read {tmp_path}: is a directory\n", "report", "--file", str(tmp_path))
    refused(2, f"error: cannot read {binary}: not UTF-8 text (byte 2)\n", "report", "--file", str(binary))
    refused(2, "error: cannot read what is piped in: not UTF-8 text (byte 2)\n", "report", MODEL, input=b"ab\xff")
    refused(2, f"error: {empty} is empty\n", "report", "--file", str(empty))
    refused(2, "error: the text is empty\n", "report", "--text", "")
    refused(2, "error: what is piped in is empty\n", "report", MODEL, "-", input="\n")
    refused(2, "Invalid value for 'TEXT': it is not UTF-8 text", "report", MODEL, "\udcff")


def test_one_model_and_one_text():
    either = "  expected: one of TEXT, --file and --tokens"
    refused(2, f"error: there is no text to read\n{either}, or a text that is piped in\n", "report")
    refused(2, f"error: there is more than one text to read\n{either}\n", "report", "--text", "x", "--file", "y")
    refused(2, "the text is given twice\n  expected: one\n  got: 'x' and 'y'", "report", MODEL, "x", "--text", "y")
    refused(2, "error: the model is given twice", "report", MODEL, "x", "--model", "other")


# --- token ids -------------------------------------------------------------------------------------------------------


def test_a_report_on_token_ids_needs_no_tokenizer(folder, tmp_path):
    out = tmp_path / "report.html"
    assert "#5" in printed("report", "--model", folder, "--tokens", "5, 3,9", "--out", str(out))
    data = as_json(printed("report", folder, "--tokens", "5 3 9", "--json"))
    assert (data["text"], [token["text"] for token in data["tokens"]]) == ("", ["#5", "#3", "#9"])


def test_one_token_alone_is_a_text():
    text = printed("report", MODEL, "--tokens", "5")
    assert "1 token; after 0" in text
    assert "there is no token before which others are" in text
    assert "no position changes it by 0.005 nats" in text
    as_json(printed("report", MODEL, "--tokens", "5", "--json"))


def test_token_ids_of_a_model_with_a_tokenizer_show_their_text(bridge):
    ids = bridge.to_tokens("import os")[0].tolist()
    data = as_json(printed("report", "--tokens", ",".join(map(str, ids)), "--json"))
    assert data["text"] == "<|endoftext|>import os"


def test_text_for_a_model_without_a_tokenizer_names_the_option_for_ids(folder):
    refused(1, "  or: --tokens 5,3,9, with token ids in place of text\n", "report", "--model", folder, "--text", "x")


@pytest.mark.parametrize("tokens", ["", " , ", "5,x", "-1", "5.0", "²"])
def test_what_are_no_token_ids_is_refused(tokens):
    refused(2, f"error: --tokens {tokens!r}: give token ids, as 5,3,9\n", "report", f"--tokens={tokens}")


def test_token_ids_outside_the_vocabulary_are_refused(folder):
    refused(1, "token ids outside the vocabulary\n  expected: 0 to 96\n", "report", "-m", folder, "--tokens", "5,97")


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_files_that_cannot_be_written(tmp_path):
    nowhere = tmp_path / "no" / "report.html"
    message = f"error: --out {nowhere}: there is no folder {nowhere.parent}\n"
    refused(2, message, "report", "--text", "x", "--out", str(nowhere))
    message = f"error: --out {tmp_path} is a folder; name a file, for instance {tmp_path / 'report.html'}\n"
    refused(2, message, "report", "--text", "x", "--out", str(tmp_path))
    text = tmp_path / "report.txt"
    message = f"error: --out {text}: there is no report with the suffix '.txt'\n  expected: .html, .json, .csv\n"
    refused(2, message + f"  fix: --out {text.with_suffix('.html')}\n", "report", "x", "y", "--out", str(text))


def test_a_text_longer_than_the_context():
    text = " x" * 600
    refused(1, "the input is longer than the model's context\n  expected: at most 512 tokens", "report", "--text", text)


def test_a_model_that_is_none(tmp_path):
    refused(1, f"error: {str(tmp_path)!r} is", "report", "--model", str(tmp_path), "--text", "x")


def test_parts_positions_and_targets_that_are_none():
    message = "error: --only lens,hed: a report has no part 'hed'\n  expected: predictions, lens, heads, effect\n"
    refused(2, message + "  nearest: heads\n", "report", MODEL, "x", "--only", "lens,hed")
    refused(2, "error: --only names no part\n", "report", MODEL, "x", "--only", ",")
    refused(2, "no position 9\n  expected: -2 to 1\n", "report", MODEL, "x", "--position", "9")
    refused(1, "'no way' is not a single token", "report", MODEL, "x", "--target", "no way")


def test_the_causal_effect_of_any_prediction(bridge):
    """Replacing what enters a layer, against a run with a hook that does it."""
    found = analysis.causal_effect(bridge, TEXT, position=3, targets=" x", progress=False)
    layer, position, token = 2, 1, bridge.to_single_token(" x")
    _, cache = bridge.run_with_cache(TEXT, [f"blocks.{layer}.hook_resid_pre"])
    mean = cache["resid_pre", layer][0, 1:].mean(0)

    def replace(value, hook):
        value[:, position] = mean
        return value

    logits = bridge.run_with_hooks(TEXT, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", replace)])
    changed, plain = (one[0, 3].log_softmax(-1)[token] for one in (logits, bridge(TEXT)))
    assert found.targets == (token,)
    torch.testing.assert_close(found.drop[layer, position], plain - changed, atol=1e-4, rtol=1e-4)
    assert not found.drop[:, 4:].abs().gt(1e-4).any()  # what comes after position 3 has no effect on it
