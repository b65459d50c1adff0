import pytest
import torch

from clearspan.plots import DIVERGING, SEQUENTIAL, chart_of
from clearspan.plots.chart import MOST_BARS, MOST_LINES
from clearspan.plots.charts import ends

NAN = torch.nan


def picture(*values, **settings):
    return chart_of(*values, **settings).figure()


@pytest.mark.parametrize(
    ("axes", "drawn"),
    [
        ({"layer": range(4)}, ["bar"]),
        ({"point": ["a", "b"]}, ["bar"]),
        ({"strength": [0.5, 1.0]}, ["scatter"]),
        ({"position": range(MOST_BARS)}, ["bar"]),
        ({"position": range(MOST_BARS + 1)}, ["scatter"]),
        ({"layer": range(2), "head": range(3)}, ["heatmap"]),
        ({"sender": ["a", "b"], "receiver": ["c", "d"]}, ["heatmap"]),
        ({"lens": ["logit", "tuned"], "depth": range(5)}, ["scatter", "scatter"]),
        ({"point": list(map(str, range(MOST_LINES + 1))), "strength": [1.0, 2.0]}, ["heatmap"]),
    ],
)
def test_a_picture_suits_the_axes(axes, drawn):
    figure = picture(torch.ones(*map(len, axes.values())), axes)
    assert [trace.type for trace in figure.data] == drawn
    assert figure.layout.xaxis.title.text == list(axes)[-1]


def test_the_kind_may_be_asked_for():
    axes = {"layer": range(2), "head": range(3)}
    assert [line.name for line in picture(torch.ones(2, 3), axes, kind="lines").data] == ["0", "1"]
    assert picture(torch.ones(3), {"head": range(3)}, kind="lines").data[0].type == "scatter"


def test_labels_stand_for_places_and_are_not_read_as_markup():
    axes, labels = {"layer": range(2), "position": range(2)}, {"position": ["0 <b>", "1 a"]}
    figure = picture(torch.ones(2, 2), axes, labels, title="at <b>", unit="p(a<b)")
    assert figure.layout.title.text == "at &lt;b&gt;"
    assert "p(a&lt;b)" in figure.data[0].hovertemplate
    assert figure.data[0].x == ("0 &lt;b&gt;", "1 a")
    assert figure.data[0].y == ("0", "1")


def test_errors_a_base_and_a_span_are_drawn():
    values = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    axes = {"run": ["one", "other"], "depth": [0, 1]}
    figure = picture(values, axes, errors=values / 10, base=0.5, span=(0, 1), unit="share", title="what")
    assert [trace.error_y.array for trace in figure.data] == [
        pytest.approx((0.02, 0.04)),
        pytest.approx((0.06, 0.08)),
    ]
    assert figure.layout.shapes[0].y0 == 0.5
    assert figure.layout.yaxis.range == (0, 1.03)
    assert (figure.layout.title.text, figure.layout.yaxis.title.text) == ("what", "share")


@pytest.mark.parametrize(
    ("values", "span", "expected"),
    [
        ([0.5, 2.0], None, ((0, 2), SEQUENTIAL)),
        ([0.5, -2.0, NAN], None, ((-2, 2), DIVERGING)),
        ([0.5, 2.0], (0, 1), ((0, 1), SEQUENTIAL)),
        ([0.5, 2.0], (-1, 1), ((-1, 1), DIVERGING)),
        ([NAN], None, ((0, 1), SEQUENTIAL)),
    ],
)
def test_colours_end_at_the_largest_value_or_where_it_is_said(values, span, expected):
    assert ends(torch.tensor(values), span) == expected


def test_unknown_values_leave_a_gap():
    figure = picture(torch.tensor([[NAN, 1.0], [-1.0, 2.0]]), {"layer": [0, 1], "head": [0, 1]})
    assert figure.data[0].zmax == 2
    assert figure.data[0].z[0][0] != figure.data[0].z[0][0]
