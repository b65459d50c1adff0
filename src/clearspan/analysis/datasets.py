"""Data sets that a user has: rows of a file, or of an object of another library, as columns that analyses take."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

from clearspan.checks import check_counts, check_kind, path_of, whole
from clearspan.errors import InputError, InvalidArgumentError, OutOfRangeError
from clearspan.points import nearest

Columns = str | Sequence[str] | Mapping[str, str] | None
"""Which columns to read: one, several, all (None), or the names that they get, each with its name in the source."""


@dataclass(frozen=True, repr=False)
class Dataset:
    """Rows with named columns. `data["text"]` is a column, and the data set itself is a corpus of its rows.

    Attributes:
        source: Where they are from.
        columns: The values of each column.
    """

    source: str
    columns: Mapping[str, tuple[Any, ...]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, key: str) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice) -> "Dataset": ...
    def __getitem__(self, key: str | int | slice) -> "tuple[Any, ...] | dict[str, Any] | Dataset":
        """Returns a column by its name, a row by its number, or rows as a data set by a slice.

        Raises:
            InputError: There is no such column.
            InvalidArgumentError: There is no such row.
        """
        if isinstance(key, str):
            if key not in self.columns:
                raise _no_column(key, self.columns, self.source)
            return self.columns[key]
        if isinstance(key, slice):
            return Dataset(self.source, {name: values[key] for name, values in self.columns.items()})
        row = whole(key)
        if row is None or not -len(self) <= row < len(self):
            raise OutOfRangeError(f"there is no row {key!r}"[:80], expected=f"a column's name, or 0 to {len(self) - 1}")
        return {name: values[row] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"Dataset({self.source}: {len(self)} rows of {', '.join(self.columns)})"


def read_dataset(
    source: str | os.PathLike[str] | Iterable[object],
    columns: Columns = None,
    *,
    limit: int | None = None,
    separator: str = "\n",
) -> Dataset:
    r"""Returns the rows of a file, or of a data set of another library. It downloads nothing.

    Args:
        source: A file: `.jsonl` (`.ndjson`), `.json` (a list of rows), `.csv`, `.tsv`, `.parquet` (which takes pyarrow)
            or `.txt` (its column is `text`). Or rows: a split of Hugging Face's `datasets`, streamed or not, a data
            frame, mappings.
        columns: Which to read. `{"text": "content"}` reads `content` under the name `text`, by which every analysis
            finds a row's text. A column named `text` must hold text in every row.
        limit: Rows to read at most; by default all.
        separator: What lies between the texts of a `.txt` file; `"\n\n"` for paragraphs. Empty texts are left out.

    Returns:
        The rows. Values of CSV and plain text are text, those of other sources what they are there.

    Raises:
        InputError: A line that is not of the format, a column that is not there, a text that is none: the error names
            file, line (from 1; for objects the row, from 0) and column. Or there are no rows.
        InvalidArgumentError: No such file, another kind of file, or splits where one split is meant.

    Example:
        >>> import json, tempfile, clearspan
        >>> from pathlib import Path
        >>> from clearspan.analysis import loss_by_position
        >>> rows = [{"code": "import os", "lang": "py"}, {"code": "import sys", "lang": "py"}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "code.jsonl")
        ...     _ = path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ...     data = read_dataset(path, {"text": "code"})
        >>> data, data["text"]
        (Dataset(code.jsonl: 2 rows of text), ('import os', 'import sys'))
        >>> loss_by_position(clearspan.boot("tiny-bigcode"), data).of().shape
        torch.Size([2, 2])
    """
    if limit is not None:
        check_counts(limit=limit)
    wanted = _wanted(columns)
    if isinstance(source, str | os.PathLike):
        path = path_of(source)
        if path.suffix not in _ENDINGS or not path.is_file():
            raise InvalidArgumentError(
                f"cannot read {str(path)!r}",
                expected=f"a file that ends in {', '.join(_ENDINGS)}",
                got="no such file" if not path.is_file() else f"a file that ends in {path.suffix or 'nothing'}",
                reason=None
                if path.is_file()
                else "data sets are read from files that are there; nothing is downloaded",
            )
        check_kind(str, separator=separator)
        where, rows = path.name, _rows_in(path, list(wanted.values()), separator)
    else:
        where, rows = type(source).__name__, _rows_of(source)
    found = _checked(islice(rows, limit), wanted, where)
    if not found:
        raise InputError("there are no rows", where=where, expected="one row or more")
    names = wanted or {name: name for name in found[0]}
    return Dataset(where, {name: tuple(row[name] for row in found) for name in names})


def _wanted(columns: Columns) -> dict[str, str]:
    """Returns the names that columns get, each with its name in the source; empty for all."""
    match columns:
        case None:
            return {}
        case str():
            return {columns: columns}
        case Mapping():
            found = dict(columns)
        case Sequence() if all(isinstance(name, str) for name in columns):
            found = {name: name for name in columns}
        case _:
            found = {}
    if not found or not all(isinstance(name, str) for pair in found.items() for name in pair):
        raise InvalidArgumentError(f"columns={columns!r}"[:80], expected="names of columns, or None for all")
    return found


# --- rows ------------------------------------------------------------------------------------------------------------

Row = tuple[str, Mapping[str, Any]]
"""Where it is, such as `line 3`, and its values."""


def _checked(rows: Iterable[Row], wanted: Mapping[str, str], source: str) -> list[Mapping[str, Any]]:
    """Returns rows under the names that their columns get, or raises naming the first that is wrong."""
    found: list[Mapping[str, Any]] = []
    for where, row in rows:
        names = wanted or {name: name for name in (found[0] if found else row)}
        for name, column in names.items():
            if column not in row:
                raise _no_column(column, row, f"{source}, {where}")
            if name == "text" and not isinstance(row[column], str):
                raise InputError(
                    "this row has no text",
                    where=f"{source}, {where}, column {column!r}",
                    expected="text",
                    got=repr(row[column])[:80],
                )
        found.append({name: row[column] for name, column in names.items()})
    return found


def _no_column(column: str, there: Iterable[str], where: str) -> InputError:
    names = [str(name) for name in there]
    return InputError(
        f"there is no column {column!r}",
        where=where,
        got=", ".join(names) or "no columns",
        nearest=nearest(column, names),
        fix='columns={"text": ...} with the name that the texts have there' if column == "text" else None,
    )


@runtime_checkable
class _Frame(Protocol):
    """A data frame of pandas or polars."""

    columns: Any

    def __getitem__(self, key: Any, /) -> Any: ...


def _rows_of(source: object) -> Iterator[Row]:
    """Yields the rows of an object."""
    if isinstance(source, _Frame):
        names = list(source.columns)
        columns = [list(source[name]) for name in names]
        given: Iterable[object] = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    elif isinstance(source, Mapping):
        raise InvalidArgumentError(
            "these are no rows",
            expected="a split of a data set, or rows with named columns",
            got=f"a mapping of {', '.join(map(str, source))}"[:80],
            fix="read_dataset(source[name]) for one split",
        )
    elif isinstance(source, Iterable):
        given = source
    else:
        raise InvalidArgumentError(f"source={source!r}"[:80], expected="a file, or rows with named columns")
    for number, row in enumerate(given):
        if not isinstance(row, Mapping):
            raise InputError(
                "this row has no columns", where=f"{type(source).__name__}, row {number}", got=repr(row)[:80]
            )
        yield f"row {number}", row


# --- files -----------------------------------------------------------------------------------------------------------

_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


def _rows_in(path: Path, wanted: Sequence[str], separator: str) -> Iterator[Row]:
    match path.suffix:
        case ".jsonl" | ".ndjson":
            return _json_lines(path)
        case ".json":
            return _json(path)
        case ".csv":
            return _separated(path, ",")
        case ".tsv":
            return _separated(path, "\t")
        case ".parquet":
            return _parquet(path, wanted)
        case ".txt":
            return _text(path, separator)
        case ending:
            raise AssertionError(f"{ending} is among the endings")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _object(_parsed(line, path, number), path, f"line {number}")


def _json(path: Path) -> Iterator[Row]:
    rows = _parsed(path.read_text(encoding="utf-8"), path, 1)
    if not isinstance(rows, list):
        raise InputError(
            "this file has no rows", where=path.name, expected="a list of rows", got=type(rows).__name__,
            fix="a .jsonl file has a row on each line",
        )  # fmt: skip
    for number, row in enumerate(rows):
        yield f"row {number}", _object(row, path, f"row {number}")


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            "this is no JSON",
            where=f"{path.name}, line {line + error.lineno - 1}, character {error.colno}",
            reason=error.msg,
            got=text.splitlines()[error.lineno - 1][:80] if text.strip() else "nothing",
        ) from error


def _object(row: object, path: Path, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(
            "this row has no columns",
            where=f"{path.name}, {where}",
            expected='an object, such as {"text": ...}',
            got=repr(row)[:80],
        )
    return row


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len({*names}) != len(names):
            raise InputError("two columns have one name", where=f"{path.name}, line 1", got=", ".join(names))
        while True:
            start = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(
                    "this line is not of the format",
                    where=f"{path.name}, line {start}",
                    reason=str(error),
                    fix="csv.field_size_limit(10**9) before it, for longer fields" if "limit" in str(error) else None,
                ) from error
            if not values:
                continue
            if len(values) != len(names):
                raise InputError(
                    "this line has another number of columns than the first",
                    where=f"{path.name}, line {start}",
                    expected=f"{len(names)}: {', '.join(names)}",
                    got=f"{len(values)}: {', '.join(values)}"[:80],
                )
            yield f"line {start}", dict(zip(names, values, strict=True))


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise InvalidArgumentError(
            f"reading {path.name} takes pyarrow", reason=str(error), fix="pip install pyarrow"
        ) from error
    with parquet.ParquetFile(path) as file:
        there = file.schema_arrow.names
        for column in wanted:
            if column not in there:
                raise _no_column(column, there, path.name)
        rows = (row for batch in file.iter_batches(columns=wanted or None) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"row {number}", row


def _text(path: Path, separator: str) -> Iterator[Row]:
    if not separator:
        raise InvalidArgumentError("separator=''", expected="what lies between texts, such as a line's end")
    number = 1
    for text in path.read_text(encoding="utf-8").split(separator):
        if text.strip():
            yield f"line {number}", {"text": text}
        number += (text + separator).count("\n")
