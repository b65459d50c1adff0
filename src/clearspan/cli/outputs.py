"""What a command makes: JSON on standard output, and files whose suffix says their form."""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clearspan.cli.endings import FAILURE, USAGE, fail, misused

if TYPE_CHECKING:
    from clearspan.results import Columns, Result

Forms = Mapping[str, Callable[[], str]]
"""By a file's suffix, what makes its text."""


def json_of(data: object) -> str:
    """Returns data as JSON, in which None stands for what is no finite number."""
    return json.dumps(_finite(data), allow_nan=False)


def _finite(data: Any) -> Any:
    match data:
        case float():
            return data if math.isfinite(data) else None
        case dict():
            return {key: _finite(value) for key, value in data.items()}
        case list() | tuple():
            return [_finite(value) for value in data]
        case _:
            return data


def rows_of(columns: "Columns") -> list[dict[str, object]]:
    """Returns a table as one object a row."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def csv_of(found: "Result") -> str:
    """Returns a result's table as CSV."""
    return str(found.to_dataframe().to_csv(index=False))


def page(title: str, body: str) -> str:
    """Returns a page of HTML around what stands alone."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"{body}\n</html>\n"
    )


def check_out(out: Path | None, name: str, suffixes: Sequence[str]) -> None:
    """Ends the command, before anything is measured, where a file cannot be written or no form has its suffix."""
    if out is None:
        return
    if not out.parent.is_dir():
        fail(f"--out {out}: there is no folder {out.parent}", USAGE)
    if out.is_dir():
        fail(f"--out {out} is a folder; name a file, for instance {out / (name + suffixes[0])}", USAGE)
    if out.suffix.lower() not in suffixes:
        misused(
            f"--out {out}: there is no {name} with the suffix {out.suffix!r}",
            expected=", ".join(suffixes),
            fix=f"--out {out.with_suffix(suffixes[0])}",
        )


def deliver(forms: Forms, out: Path | None, show: Callable[[], None], *, as_json: bool) -> None:
    """Shows a result, or prints its JSON instead, and writes the file that was asked for."""
    if as_json:
        typer.echo(forms[".json"]())
    else:
        show()
    if out is not None:
        write(forms, out)


def write(forms: Forms, out: Path) -> None:
    """Writes a result to a file, in the form of its suffix."""
    content = forms[out.suffix.lower()]().encode("utf-8")
    try:
        out.write_bytes(content)
    except OSError as error:
        fail(f"cannot write {out}: {(error.strerror or str(error)).lower()}", FAILURE)
    told(out)


def told(out: Path) -> None:
    """Says on standard error that a file was written, and how large it is if that is much."""
    megabytes = out.stat().st_size / 1e6
    typer.echo(f"wrote {out}" + (f" ({megabytes:z.1f} MB)" if megabytes >= 0.1 else ""), err=True)
