"""Texts that a model wrote, in the terminal: what was given dim, what it added plain."""

from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from .cells import plain


def show_generations(prompt: str, continuations: Mapping[str, str], console: Console) -> None:
    """Prints each continuation behind the prompt, under its name.

    Args:
        prompt: What all of them continue.
        continuations: By name. Control characters in them are written out.
        console: Where.
    """
    given = plain(prompt)
    given.stylize("dim")
    for place, (name, text) in enumerate(continuations.items()):
        if place:
            console.print()
        console.print(Text(name, style="bold"))
        console.print(Text.assemble(given, plain(text)))
