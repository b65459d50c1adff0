"""The HTML page: one file that holds its figures, its data and Plotly, and asks the network for nothing."""

import base64
import json
import math
import re
from dataclasses import dataclass

import plotly.graph_objects as go
import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from clearspan.analysis import Report, strongest
from clearspan.plots import positions, visible

from .figures import effect_figure, head_figure, lens_figure, pattern_figure

ATTENTION_BYTES = 32_000_000
"""Most that the attention of all heads may take in the page; a longer text shows its last positions."""

FULL_SURPRISE = 10.0
"""Bits of surprise at which a token has the full colour."""


@dataclass(frozen=True)
class Guess:
    """A predicted token, as the page writes it."""

    label: str
    prob: float


@dataclass(frozen=True)
class TokenSpan:
    """A token of the text, as the page writes it.

    Attributes:
        label: The token with its white space visible.
        lines: The same, cut after each line break.
        surprise: Share of the full colour, from 0 to 1.
        prob: The probability it was given; None for the first.
        guesses: Likeliest tokens after it.
    """

    label: str
    lines: tuple[str, ...]
    surprise: float
    prob: float | None
    guesses: tuple[Guess, ...]


def html_page(report: Report) -> str:
    """Returns the page, which opens from a file without a network.

    Its scripts and styles are inline, text is escaped, and it has a light and a dark form, which the reader's system
    chooses.
    """
    environment = Environment(
        loader=PackageLoader("clearspan.view"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    spans = _spans(report)
    last = min(len(report.tokens), int(math.sqrt(ATTENTION_BYTES * 0.75 / 2 / report.patterns[..., 0, 0].numel())))
    heads = {"induction": strongest(report.heads.induction), "previous token": strongest(report.heads.previous_token)}
    shown = heads["induction"][0]
    figures = {
        "lens": lens_figure(report),
        "induction": head_figure(report.heads.induction, name="induction"),
        "previous": head_figure(report.heads.previous_token, name="previous token"),
        "pattern": pattern_figure(report, shown.layer, shown.head, last=last),
        "effect": effect_figure(report),
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        target=visible(report.words[report.effect.target]),
        spans=spans,
        heads=heads,
        shown=shown,
        last=last,
        data={
            "figures": {name: _plain(figure) for name, figure in figures.items()},
            "tokens": [[span.label, span.prob, [[g.label, g.prob] for g in span.guesses]] for span in spans],
            "attention": {"size": last, "names": positions(report.tokens)[-last:]},
        },
        attention=_packed(report.patterns[..., -last:, -last:]),
        plotly=Markup(get_plotlyjs()),
    )


def _spans(report: Report) -> list[TokenSpan]:
    found = report.predictions
    probs = [None, *found.next_probs.tolist()]
    return [
        TokenSpan(
            label=visible(token),
            lines=tuple(visible(line) if line else "" for line in re.split(r"(?<=\n)", token)),
            surprise=0.0 if prob is None else min(-math.log2(max(prob, 1e-9)) / FULL_SURPRISE, 1.0),
            prob=prob if prob is None else round(prob, 4),
            guesses=tuple(Guess(visible(report.words[i]), round(p, 4)) for i, p in zip(ids, top, strict=True)),
        )
        for token, prob, ids, top in zip(
            report.tokens, probs, found.top_ids.tolist(), found.top_probs.tolist(), strict=True
        )
    ]


def _plain(figure: go.Figure) -> dict[str, object]:
    return json.loads(json.dumps(figure.to_plotly_json(), cls=PlotlyJSONEncoder))


def _packed(patterns: torch.Tensor) -> str:
    """Returns attention as base64 of unsigned 16-bit shares of 1, in the order of the axes."""
    shares = patterns.mul(65535).round().clamp(0, 65535).to(torch.uint16)
    return base64.b64encode(shares.contiguous().view(torch.uint8).numpy().tobytes()).decode()
