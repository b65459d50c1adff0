"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, TypeVar

import typer

Given = TypeVar("Given", str | None, list[str])


def utf8(given: Given) -> Given:
    """Returns text that an argument is, if it is text."""
    try:
        "".join(given or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise typer.BadParameter("it is not UTF-8 text") from error
    return given


MODEL = "The embedded model (tiny-bigcode), a checkpoint folder, or a hub id."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
Text = Annotated[
    str | None,
    typer.Argument(
        metavar="TEXT", callback=utf8, help="The text to read; - or nothing for what is piped in.", show_default=False
    ),
]
File = Annotated[
    Path | None, typer.Option("--file", "-f", help="A UTF-8 file to read instead; - for what is piped in.")
]
Tokens = Annotated[
    str | None, typer.Option("--tokens", help="Token ids to read instead, as 5,3,9: no tokenizer is needed.")
]
Clean = Annotated[str, typer.Argument(metavar="CLEAN", callback=utf8, help="The prompt as it is.", show_default=False)]
Corrupted = Annotated[
    str,
    typer.Argument(
        metavar="CORRUPTED",
        callback=utf8,
        help="The other prompt, of as many tokens, that differs in what is looked for.",
        show_default=False,
    ),
]
Answers = Annotated[
    list[str],
    typer.Option(
        "--answers",
        "-a",
        callback=utf8,
        help="The clean prompt's answer and the corrupted one's, each one token: ' os, re', or the option twice. The "
        "logit difference of the two is measured; of one alone, its logit.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Full = Annotated[bool, typer.Option("--full", help="Show everything, not only what matters most.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Let transformers show its progress, warnings and load report.")
]
