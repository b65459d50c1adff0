"""The HTML page: one file that holds its figures, its data and Plotly, and asks the network for nothing."""

import base64
import json
import math
import re
from typing import Any

import plotly.graph_objects as go
import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from clearspan.analysis import Report, strongest
from clearspan.plots import positions, visible

from .figures import effect_figure, head_figure, lens_figure, pattern_figure

FULL_SURPRISE = 10.0
"""Bits of surprise at which a token has the full colour."""


def html_page(report: Report, *, attention_bytes: int = 32_000_000) -> str:
    """Returns the page, which opens from a file without a network.

    Its scripts and styles are inline, text is escaped, and it has a light and a dark form, which the reader's system
    chooses.

    Args:
        report: What the page shows.
        attention_bytes: Most that the attention of all heads may take in the page; a longer text shows its last
            positions.
    """
    environment = Environment(
        loader=PackageLoader("clearspan.view"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    spans = _spans(report)
    room = int(math.sqrt(attention_bytes * 0.75 / 2 / report.patterns[..., 0, 0].numel()))
    last = max(1, min(len(report.tokens), room))
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
        target=visible(report.target),
        spans=spans,
        heads=heads,
        shown=shown,
        last=last,
        data={
            "figures": {name: _plain(figure) for name, figure in figures.items()},
            "tokens": [[span["label"], span["prob"], span["guesses"]] for span in spans],
            "attention": {"size": last, "names": positions(report.tokens)[-last:]},
        },
        attention=_packed(report.patterns[..., -last:, -last:]),
        plotly=Markup(get_plotlyjs()),
    )


def _spans(report: Report) -> list[dict[str, Any]]:
    """Returns each token as the page writes it.

    - `label`: the token with its white space visible; `lines`: the same, cut after each line break
    - `prob`: the probability it was given, None for the first; `surprise`: its share of the full colour
    - `guesses`: the likeliest tokens after it, each a label and a probability
    """
    found, spans = report.predictions, []
    columns = (report.tokens, found.token_probs.tolist(), found.top_ids.tolist(), found.top_probs.tolist())
    for token, prob, ids, top in zip(*columns, strict=True):
        is_first = math.isnan(prob)
        spans.append(
            {
                "label": visible(token),
                "lines": [visible(line) if line else "" for line in re.split(r"(?<=\n)", token)],
                "surprise": 0.0 if is_first else min(-math.log2(max(prob, 1e-9)) / FULL_SURPRISE, 1.0),
                "prob": None if is_first else round(prob, 4),
                "guesses": [[visible(report.words[i]), round(p, 4)] for i, p in zip(ids, top, strict=True)],
            }
        )
    return spans


def _plain(figure: go.Figure) -> dict[str, object]:
    return json.loads(json.dumps(figure.to_plotly_json(), cls=PlotlyJSONEncoder))


def _packed(patterns: torch.Tensor) -> str:
    """Returns attention as base64 of unsigned 16-bit shares of 1, in the order of the axes."""
    shares = patterns.mul(65535).round().clamp(0, 65535).to(torch.uint16)
    return base64.b64encode(shares.contiguous().view(torch.uint8).numpy().tobytes()).decode()
