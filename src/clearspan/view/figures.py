"""Plotly figures of the parts of a `Report`.

Each is an ordinary figure that a notebook shows and that can be changed further. plotly is imported when one is drawn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from clearspan.analysis import Report
from clearspan.checks import check_counts
from clearspan.errors import InvalidArgumentError
from clearspan.plots import DIVERGING, MONOSPACE, SEQUENTIAL, plotly_text, positions
from clearspan.plots.charts import heat, rounded

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_TICKS = 72


def _ticks(tokens: Sequence[str], *, width: int, first: int = 0, most: int = MOST_TICKS) -> dict[str, object]:
    """Returns an axis' ticks: the token at each position, or at every n-th where there are more than `most`."""
    step = -(-(len(tokens) - first) // most)
    shown = range(first, len(tokens), step)
    names = positions(tokens)
    return {
        "tickmode": "array",
        "tickvals": [names[i] for i in shown],
        "ticktext": [plotly_text(tokens[i], width) for i in shown],
        "tickfont": {"family": MONOSPACE, "size": 11},
    }


def lens_figure(report: Report) -> "go.Figure":
    """Returns the logit lens: positions down, depth from left to right, the likeliest token in each cell.

    A token is bold where it is already the model's own prediction.
    """
    lens, count = report.lens, len(report.tokens)
    ids, ranks, probs = lens.top_ids.T.tolist(), lens.final_ranks.T.tolist(), rounded(lens.final_probs.T)
    wide, narrow = (
        {token: plotly_text(report.words[token], width) for row in ids for token in row} for width in (24, 11)
    )
    figure = heat(
        rounded(lens.top_probs.T),
        SEQUENTIAL,
        x=list(report.depths),
        y=positions(report.tokens),
        zmin=0,
        zmax=1,
        text=[
            [f"<b>{narrow[token]}</b>" if rank == 0 else narrow[token] for token, rank in zip(*cells, strict=True)]
            for cells in zip(ids, ranks, strict=True)
        ],
        texttemplate="%{text}",
        textfont={"family": MONOSPACE, "size": 11},
        customdata=[
            [[wide[token], wide[row[-1]], rank, prob] for token, rank, prob in zip(row, *own, strict=True)]
            for row, *own in zip(ids, ranks, probs, strict=True)
        ],
        hovertemplate="after %{y}, %{x}<br>says <b>%{customdata[0]}</b>  p %{z:.3f}<br>"
        "the model says <b>%{customdata[1]}</b>: here rank %{customdata[2]}, p %{customdata[3]:.3f}<extra></extra>",
    )
    ticks = _ticks(report.tokens, width=14, most=count)
    return figure.update_layout(height=22 * count + 48, xaxis={"side": "top"}, yaxis=ticks)


def head_figure(scores: Tensor, *, name: str) -> "go.Figure":
    """Returns one score of every head: layers down, heads from left to right.

    Args:
        scores: `[layer, head]`, from 0 to 1.
        name: The score's name, for the hover text.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise InvalidArgumentError("scores are one for each head", expected="a tensor [layer, head]")
    n_layers, n_heads = scores.shape
    figure = heat(
        rounded(scores),
        SEQUENTIAL,
        x=[f"H{head}" for head in range(n_heads)],
        y=[f"L{layer}" for layer in range(n_layers)],
        zmin=0,
        zmax=1,
        hovertemplate=f"%{{y}}%{{x}}<br>{name} %{{z:.3f}}<extra></extra>",
    )
    return figure.update_layout(height=max(180, 30 * n_layers + 40))


def effect_figure(report: Report) -> "go.Figure":
    """Returns the causal effect in nats: layers down, positions from left to right."""
    drop, bound = report.effect.drop, report.effect.bound
    figure = heat(
        rounded(drop),
        DIVERGING,
        x=positions(report.tokens),
        y=list(report.depths[1:]),
        zmin=-bound,
        zmax=bound,
        hovertemplate="%{y}, %{x}<br>costs %{z:+.3f} nats<extra></extra>",
    )
    ticks = _ticks(report.tokens, width=12)
    return figure.update_layout(height=max(160, 26 * len(drop)) + 130, xaxis=ticks | {"tickangle": -90})


def pattern_figure(report: Report, layer: int, head: int, *, last: int | None = None) -> "go.Figure":
    """Returns one head's attention: from the token on the left to the token below.

    Args:
        report: The report.
        layer: Its layer, negative from the end.
        head: Its number, negative from the end.
        last: How many positions are shown, counted from the end; all of them without it.

    Raises:
        InvalidArgumentError: There is no such head.
    """
    for name, place, count in zip(("layer", "head"), (layer, head), report.patterns.shape[:2], strict=True):
        if not isinstance(place, int) or not -count <= place < count:
            raise InvalidArgumentError(f"there is no {name} {place!r}", expected=f"-{count} to {count - 1}")
    if last is not None:
        check_counts(last=last)
    first = max(0, len(report.tokens) - last) if last else 0
    names = positions(report.tokens)[first:]
    figure = heat(
        rounded(report.patterns[layer, head, first:, first:]),
        SEQUENTIAL,
        x=names,
        y=names,
        zmin=0,
        zmax=1,
        hovertemplate="from %{y}<br>to %{x}<br>attention %{z:.3f}<extra></extra>",
    )
    ticks = _ticks(report.tokens, width=12, first=first) | {"fixedrange": False}
    figure.update_traces(xgap=0, ygap=0)
    return figure.update_layout(dragmode="zoom", xaxis=ticks | {"tickangle": -90}, yaxis=ticks)
