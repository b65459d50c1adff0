"""The page of a report: one file that holds its drawings and its data, and asks the network for nothing.

What may run in it is known by hash (a policy in the page's head): the script that unpacks, the script that draws, and
the style. Without scripts it shows the headline, the text and what comes next, and says what is missing.
"""

import base64
import hashlib
import math
import re
import tempfile
import webbrowser
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from clearspan.analysis import Head, Report, strongest
from clearspan.checks import check_kind
from clearspan.files import write_text
from clearspan.plots import visible

from .headline import headline
from .packing import Document, Quantised, compressed, packed
from .scripts import DRAWINGS, script

MOST_LABEL = 14
"""Characters of a token on an axis."""


@dataclass(frozen=True)
class _Parts:
    """What all pages share: the style, the script that unpacks, and the one that draws, with their hashes."""

    style: str
    boot: str
    drawings: str

    @property
    def policy(self) -> str:
        """The content security policy that lets these run and nothing else, and nothing be fetched."""
        scripts = f"script-src {_hash(self.boot)} {_hash(self.drawings)}"
        return f"default-src 'none'; {scripts}; style-src {_hash(self.style)}; base-uri 'none'; form-action 'none'"


@cache
def _parts() -> _Parts:
    style = "".join((DRAWINGS / name).read_text(encoding="utf-8") for name in ("drawings.css", "report.css"))
    return _Parts(style, script(DRAWINGS / "boot.js"), script(DRAWINGS / "report.js"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def html_page(report: Report, *, attention_bytes: int = 16_000_000) -> str:
    """Returns the page, which opens from a file without a network.

    Args:
        report: What the page shows.
        attention_bytes: Most that the attention of all heads may take before it is compressed, a byte for each pair of
            positions; a longer text shows its last positions.
    """
    loader = PackageLoader("clearspan.view", "drawings")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    heads = report.patterns[..., 0, 0].numel()
    room = (math.isqrt(1 + 8 * (attention_bytes // heads)) - 1) // 2
    kept = max(1, min(len(report.tokens), room))
    parts = _parts()
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        tokens=[_lines(token) for token in report.tokens],
        guesses=_guesses(report),
        policy=parts.policy,
        style=Markup(parts.style),
        boot=Markup(parts.boot),
        script=compressed(parts.drawings.encode()),
        data=packed(_document(report, kept)),
    )


def save_report(report: Report, path: str | Path) -> None:
    """Writes the page of a report to a file.

    Raises:
        InvalidArgumentError: There is no such folder, or the path is one.
    """
    write_text(path, html_page(report))


def open_report(report: Report) -> Path:
    """Writes the page of a report to a temporary file, opens it in the browser, and returns the file's path.

    Raises:
        InvalidArgumentError: No report.
    """
    check_kind(Report, report=report)
    path = Path(tempfile.mkdtemp(prefix="clearspan-")) / "report.html"
    save_report(report, path)
    webbrowser.open(path.as_uri())
    return path


def _document(report: Report, kept: int) -> Document:
    """Returns what the page's script reads, with the attention of the last `kept` positions."""
    found, lens, effect = report.predictions, report.lens, report.effect
    ids = sorted({*report.token_ids, *found.top_ids.flatten().tolist(), *lens.top_ids.flatten().tolist()})
    index = {token: place for place, token in enumerate(ids)}
    scores = {"Induction": report.heads.induction, "Previous token": report.heads.previous_token}
    first = len(report.tokens) - kept
    labels = [visible(token, MOST_LABEL) for token in report.tokens]
    tokens = [visible(token) for token in report.tokens]
    shown = strongest(report.heads.induction)[0]
    most = max(effect.drop.abs().nan_to_num().max().item(), effect.bound)
    return {
        "tokens": tokens,
        "labels": labels,
        "isIds": not report.text,
        "words": [visible(report.words[token]) for token in ids],
        "target": visible(report.target),
        "layers": [f"layer {layer}" for layer in range(report.model.layers)],
        "headNames": [f"H{head}" for head in range(report.model.heads)],
        "start": {"layer": shown.layer, "head": shown.head},
        "probabilities": Quantised(found.token_probs),
        "guesses": {
            "ids": [[index[token] for token in row] for row in found.top_ids.tolist()],
            "probabilities": Quantised(found.top_probs),
        },
        "lens": {
            "depths": report.depths,
            "ids": [[index[token] for token in row] for row in lens.top_ids.tolist()],
            "ranks": lens.final_ranks,
            "probabilities": Quantised(lens.top_probs),
            "own": Quantised(lens.final_probs),
        },
        "effect": {
            "drop": Quantised(effect.drop, -most, most),
            "bound": effect.bound,
            "logProbability": effect.log_prob,
        },
        "heads": [
            {"name": name, "values": Quantised(one), "strongest": [_place(head) for head in strongest(one)]}
            for name, one in scores.items()
        ],
        "attention": {
            "patterns": Quantised(report.patterns[..., first:, first:], bits=8, is_triangular=True),
            "first": first,
            "labels": labels[first:],
            "tokens": tokens,
        },
    }


def _place(head: Head) -> tuple[int, int]:
    return head.layer, head.head


def _lines(token: str) -> list[str]:
    """Returns a token as it is written, cut after each line break."""
    return [visible(line) if line else "" for line in re.split(r"(?<=\n)", token)]


def _guesses(report: Report) -> list[tuple[str, float]]:
    """Returns the likeliest tokens after the last, with their probabilities."""
    found = report.predictions
    ids, probs = found.top_ids[-1].tolist(), found.top_probs[-1].tolist()
    return [(visible(report.words[token]), prob) for token, prob in zip(ids, probs, strict=True)]
