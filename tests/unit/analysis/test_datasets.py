"""Data sets of files and objects: the rows that are there, and errors that name line and column."""

import importlib.util
import json

import pandas
import pytest
import torch

import clearspan
from clearspan.analysis import Dataset, loss_by_position, max_activating_examples, read_dataset, train_probe
from clearspan.errors import InputError, InvalidArgumentError

ROWS = [
    {"text": "import os", "label": "py", "n": 1},
    {"text": 'print("a, b")\n', "label": "py", "n": 2},
    {"text": "größer = 3", "label": "de", "n": 3},
]
AS_TEXT = [{name: str(value) for name, value in row.items()} for row in ROWS]


def write(path, rows):
    """Writes rows as the path's ending says, by other means than the reader's."""
    frame = pandas.DataFrame(rows)
    match path.suffix:
        case ".jsonl" | ".ndjson":
            path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_a_file_has_the_rows_that_were_written(ending, tmp_path):
    data = read_dataset(write(tmp_path / f"rows.{ending}", ROWS))
    assert list(data) == (AS_TEXT if ending in ("csv", "tsv") else ROWS)
    assert repr(data) == f"Dataset(rows.{ending}: 3 rows of text, label, n)"


class Streamed:
    """What a streamed split is: rows that can be gone through, and not counted."""

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize("source", [ROWS, tuple(ROWS), Streamed(), pandas.DataFrame(ROWS), iter(ROWS)], ids=type)
def test_an_object_has_its_rows(source):
    assert list(read_dataset(source)) == ROWS


def test_columns_rows_and_slices():
    data = read_dataset(ROWS, {"text": "label", "count": "n"})
    assert data["text"] == ("py", "py", "de")
    assert data[-1] == {"text": "de", "count": 3}
    assert list(data[1:]) == [{"text": "py", "count": 2}, {"text": "de", "count": 3}]
    assert list(read_dataset(data, "count", limit=2)) == [{"count": 1}, {"count": 2}]
    assert read_dataset(ROWS, ["n", "label"]).columns.keys() == {"n", "label"}
    with pytest.raises(IndexError, match=r"no row 3\n  expected: a column's name, or 0 to 2"):
        data[3]
    with pytest.raises(InputError, match=r"no column 'texts'\n  got: text, count\n  where: list\n  nearest: text"):
        data["texts"]


def test_a_limit_stops_before_what_is_wrong(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nnot json')
    assert read_dataset(path, limit=2)["text"] == ("a", "b")


def test_plain_text_is_a_text_for_each_line_or_paragraph(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("one\n\ntwo\nthree\n")
    assert read_dataset(path)["text"] == ("one", "two", "three")
    assert read_dataset(path, separator="\n\n")["text"] == ("one", "two\nthree\n")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed, and reads Parquet")
def test_parquet_takes_pyarrow(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"")
    with pytest.raises(
        InvalidArgumentError, match=r"reading rows.parquet takes pyarrow(.|\n)*fix: pip install pyarrow"
    ):
        read_dataset(path)


def test_parquet_has_the_rows_that_were_written(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet files are read by pyarrow, which is not installed")
    path = tmp_path / "rows.parquet"
    pandas.DataFrame(ROWS).to_parquet(path)
    assert list(read_dataset(path)) == ROWS
    with pytest.raises(InputError, match=r"no column 'texts'\n  got: text, label, n\n  where: rows.parquet"):
        read_dataset(path, ["texts"])


WRONG = [
    ("rows.jsonl", '{"text": "a"}\n{"text": }\n', None, r"no JSON(.|\n)*where: rows.jsonl, line 2, character 10"),
    ("rows.jsonl", '{"text": "a"}\n\n["b"]\n', None, r"no columns(.|\n)*where: rows.jsonl, line 3"),
    ("rows.jsonl", '{"text": "a"}\n{"label": 1}\n', None, r"no column 'text'(.|\n)*where: rows.jsonl, line 2"),
    ("rows.jsonl", '{"text": "a"}\n{"text": 3}\n', None, r"no text(.|\n)*where: rows.jsonl, line 2, column 'text'"),
    ("rows.jsonl", '{"code": 3}\n', {"text": "code"}, r"where: rows.jsonl, line 1, column 'code'"),
    ("rows.jsonl", '{"content": "a"}\n', "text", r'fix: columns=\{"text": ...\}'),
    ("rows.jsonl", "\n", None, "there are no rows"),
    ("rows.json", '{"text": "a"}', None, r"no rows\n  expected: a list of rows\n  got: dict"),
    ("rows.json", '[\n{"text": "a"},\n]', None, "where: rows.json, line 3"),
    ("rows.json", '[{"text": "a"}, 3]', None, "where: rows.json, row 1"),
    ("rows.csv", "text,label\na,1\nb\n", None, r"expected: 2: text, label\n  got: 1: b\n  where: rows.csv, line 3"),
    ("rows.csv", 'text,label\n"a\nb",1\nc,2,3\n', None, "where: rows.csv, line 4"),
    ("rows.csv", 'text\n"a" b\n', None, r"not of the format\n  where: rows.csv, line 2"),
    ("rows.csv", "text,text\na,b\n", None, "two columns have one name"),
    ("rows.csv", "text\n", None, "there are no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "columns", "message"), WRONG)
def test_what_is_wrong_is_named_by_line_and_column(name, content, columns, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_dataset(path, columns)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (
            "nowhere.jsonl",
            {},
            r"cannot read 'nowhere.jsonl'(.|\n)*got: no such file\n  reason: .*nothing is downloaded",
        ),
        (__file__, {}, "got: a file that ends in .py"),
        (3, {}, "source=3"),
        ({"train": ROWS, "test": ROWS}, {}, r"no rows(.|\n)*got: a mapping of train, test"),
        (ROWS, {"columns": []}, r"columns=\[\]"),
        (ROWS, {"columns": {"text": 3}}, "columns="),
        (ROWS, {"limit": 0}, "limit=0"),
    ],
)
def test_wrong_arguments(source, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        read_dataset(source, **settings)


def test_rows_that_have_no_columns():
    with pytest.raises(InputError, match=r"no columns\n  got: 'import os'\n  where: list, row 0"):
        read_dataset(["import os"])


def test_analyses_take_it():
    bridge = clearspan.boot("tiny-bigcode")
    data = read_dataset(
        [{"code": f"x{n} = {n}", "kind": "a"} for n in range(6)] + ROWS[:0], {"text": "code", "kind": "kind"}
    )
    assert isinstance(data, Dataset)
    torch.testing.assert_close(loss_by_position(bridge, data).of(), loss_by_position(bridge, list(data["text"])).of())
    found = max_activating_examples(bridge, data, "blocks.0.mlp.hook_post", index=0, k=2)
    assert found.text_count == 6
    labels = ["even", "odd"] * 3
    assert train_probe(bridge, data["text"], labels, layers=0, folds=3, controls=1, progress=False).accuracy.shape == (
        1,
    )
