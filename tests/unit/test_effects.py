"""Effects against the same numbers computed row by row in plain Python, on random grids with missing rows."""

import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearspan.effects import Effects
from clearspan.errors import InvalidArgumentError
from clearspan.results import number
from clearspan.statistics import bootstrap_interval, standard_error

NAN = math.nan
AXES = {"layer": (2, 3, 5), "position": (0, 1), "head": (0, 4)}


@st.composite
def grids(draw, least_rows=1):
    """Effects on one to three axes, with a base and a source, where rows may lack places."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    rows, seed = draw(st.integers(least_rows, 5)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*sizes, rows, generator=generator)
    missing = torch.rand(*sizes, rows, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    axes = {name: tuple(range(10, 10 + size)) for name, size in zip(("layer", "position", "head"), sizes, strict=False)}
    base, source = torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)
    return Effects({"m": values.masked_fill(missing, NAN)}, axes, {"m": base}, {"clean": {"m": source}})


def by_place(found):
    """Yields each place's number on the axes, and its rows as plain numbers that are known, with their row's number."""
    for at in itertools.product(*(range(len(places)) for places in found.axes.values())):
        yield at, [(row, one) for row, one in enumerate(found.of()[at].tolist()) if one == one]


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else NAN


@settings(deadline=None, max_examples=60)
@given(grids())
def test_rows_that_lack_a_place_are_left_out_everywhere(found):
    base, source = found.base["m"].tolist(), found.sources["clean"]["m"].tolist()
    means, shares, changes = found.mean(), found.normalised(), found.change()
    for at, known in by_place(found):
        values = [one for _, one in known]
        low, high = mean([base[row] for row, _ in known]), mean([source[row] for row, _ in known])
        assert means[at].item() == pytest.approx(mean(values), nan_ok=True, abs=1e-6)
        if known and abs(high - low) > 0.05:
            assert shares[at].item() == pytest.approx((mean(values) - low) / (high - low), rel=1e-3, abs=1e-4)
        for row, one in known:
            assert changes[(*at, row)].item() == pytest.approx(one - base[row], abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(grids(least_rows=2))
def test_errors_are_those_of_the_rows_that_have_the_place(found):
    errors, interval = found.standard_error(), found.interval(seed=3)
    for at, known in by_place(found):
        changes = torch.tensor([one - found.base["m"][row] for row, one in known])
        if len(known) < 2:
            assert errors[at].isnan()
            assert interval.low[at].isnan()
        else:
            own = bootstrap_interval(changes, seed=3)
            torch.testing.assert_close(errors[at], standard_error(changes).float())
            torch.testing.assert_close(interval.low[at], own.low, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(interval.high[at], own.high, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(grids(), st.data())
def test_selecting_leaves_the_numbers_of_the_places_as_they_are(found, data):
    axis = data.draw(st.sampled_from(list(found.axes)))
    places, dim = found.axes[axis], list(found.axes).index(axis)
    one = data.draw(st.sampled_from(places))
    several = data.draw(st.lists(st.sampled_from(places), min_size=1, unique=True))
    number = places.index(one)
    torch.testing.assert_close(
        found.select(**{axis: one}).of(), found.of().select(dim, number), equal_nan=True, rtol=0, atol=0
    )
    kept = found.select(**{axis: several})
    assert kept.axes[axis] == tuple(several)
    numbers = torch.tensor([places.index(place) for place in several])
    torch.testing.assert_close(kept.of(), found.of().index_select(dim, numbers), equal_nan=True, rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(grids(), st.integers(1, 30))
def test_the_top_are_the_largest_changes_of_either_sign(found, k):
    top = found.top(k)
    changes = {
        tuple(places[i] for i, places in zip(at, found.axes.values(), strict=True)): mean(
            [one - found.base["m"][row].item() for row, one in known]
        )
        for at, known in by_place(found)
        if known
    }
    ((axis, places),) = top.axes.items()
    assert axis == ", ".join(found.axes)
    chosen = [place if len(found.axes) > 1 else (place,) for place in places]
    assert len(chosen) == min(k, len(changes))
    sizes = [abs(changes[place]) for place in chosen]
    for first, second in itertools.pairwise(sizes):
        assert first >= second * (1 - 1e-3)
    left = [abs(one) for place, one in changes.items() if place not in chosen]
    assert not left or min(sizes) >= max(left) * (1 - 1e-3)
    torch.testing.assert_close(
        top.change().nanmean(-1), torch.tensor([changes[place] for place in chosen]), rtol=1e-4, atol=1e-5
    )


@settings(deadline=None, max_examples=40)
@given(grids())
def test_the_table_has_a_row_for_each_place_that_any_row_has(found):
    frame = found.to_dataframe()
    known = [at for at, rows in by_place(found) if rows]
    assert len(frame) == len(known)
    assert list(frame.columns[: len(found.axes)]) == list(found.axes)
    for (_, row), at in zip(frame.iterrows(), known, strict=True):
        assert [row[axis] for axis in found.axes] == [
            found.axes[axis][i] for axis, i in zip(found.axes, at, strict=True)
        ]
        assert row["m"] == pytest.approx(found.mean()[at].item())
        assert row["change"] == pytest.approx(found.change()[at].nanmean().item())
    assert ("standard error" in frame.columns) == (found.of().shape[-1] > 1)


@settings(deadline=None, max_examples=40)
@given(grids())
def test_json_and_files_give_the_same_effects(found):
    again = Effects.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    for name in ("of", "mean", "change", "normalised"):
        torch.testing.assert_close(getattr(again, name)(), getattr(found, name)(), equal_nan=True, rtol=0, atol=0)
    assert (again.axes, again.labels, str(again)) == (found.axes, found.labels, str(found))


def test_a_file_keeps_everything(tmp_path):
    values = torch.arange(4, dtype=torch.float64).reshape(2, 2)
    found = Effects(
        {"loss": values},
        {"position": ((0, 1), 4)},
        {"loss": torch.ones(2)},
        {"corrupted": {"loss": torch.zeros(2)}},
        {"position": ("0, 1 ab", "4 c")},
        "one position patched",
        {"loss": "nats"},
        (0, 5),
        "text",
    )
    found.save(tmp_path / "effects.json")
    again = Effects.load(tmp_path / "effects.json")
    assert str(again) == str(found)
    assert again.axes == {"position": ((0, 1), 4)}
    assert (again.span, again.row, again.units, again.texts) == (found.span, found.row, found.units, found.texts)
    assert again.of().dtype == torch.float64
    torch.testing.assert_close(again.normalised("corrupted"), found.normalised())


def grid(values, **given):
    names = ("layer", "position", "head")
    axes = {name: AXES[name][:size] for name, size in zip(names, values.shape[:-1], strict=False)}
    return Effects({"m": values}, axes, **given)


def test_a_metric_that_is_one_number_for_all_rows_has_one_row():
    found = grid(torch.tensor([[1.0], [3.0]]), base={"m": torch.tensor([2.0])})
    assert found.change().tolist() == [[-1.0], [1.0]]
    assert "rows" not in found.title
    assert "standard error" not in found.columns()
    with pytest.raises(InvalidArgumentError, match="there are too few rows"):
        found.standard_error()


def test_metrics_of_different_rows_stand_side_by_side():
    values = {"loss": torch.ones(2, 3), "share": torch.tensor([[0.5], [0.25]])}
    found = Effects(values, {"layer": (0, 1)}, {"loss": torch.zeros(3)}, units={"loss": "nats"})
    assert list(found.columns()) == ["layer", "loss", "share", "change", "standard error"]
    assert found.title == "loss in nats and share with one cell of layer changed; 0.0000 without; mean over 3 rows"
    assert found.change("share").tolist() == [[0.5], [0.25]]
    with pytest.raises(
        InvalidArgumentError, match="no metric is named 'los'\n  expected: loss, share\n  nearest: loss"
    ):
        found.mean("los")


def test_it_prints_the_largest_changes_first_and_texts_for_places():
    values = torch.tensor([[[0.5], [-2.0]], [[NAN], [1.0]]])
    found = grid(values, base={"m": torch.zeros(1)}, texts={"position": ("0 a", "1 ·b")}, units={"m": "logits"})
    assert str(found).splitlines() == [
        "m in logits with one cell of layer, position changed; 0.0000 without",
        "layer  position        m   change",
        "    2  1 ·b      -2.0000  -2.0000",
        "    3  1 ·b       1.0000   1.0000",
        "    2  0 a        0.5000   0.5000",
    ]
    assert found.labels == {"layer": ("2", "3"), "position": ("0 a", "1 ·b")}
    assert found.top(1).labels == {"layer, position": ("L2 1 ·b",)}
    assert str(found.top(1)).splitlines()[1:] == [
        "layer, position        m   change",
        "L2 1 ·b          -2.0000  -2.0000",
    ]
    assert list(found.to_dataframe()["position text"]) == ["0 a", "1 ·b", "1 ·b"]
    assert found.select(layer=3).title.startswith("m in logits with one cell of layer, position changed, layer 3;")


def test_zero_has_no_sign():
    found = grid(torch.tensor([[-0.0]]), base={"m": torch.tensor([0.0])})
    assert "-0" not in str(found)
    assert number(-0.0) == "0.0000"


def test_scores_between_two_ends_rank_by_value_and_changes_by_size():
    scores = torch.tensor([[-0.9], [0.1], [0.4]])
    assert grid(scores, span=(-1, 1)).top(3).axes == {"layer": (5, 3, 2)}
    assert grid(scores).top(3).axes == {"layer": (2, 5, 3)}


def test_sizes_that_differ_by_rounding_keep_the_order_of_the_table():
    scores = torch.tensor([[1.0], [1.0000001], [-1.0000002]], dtype=torch.float64)
    assert grid(scores).top(3).axes == {"layer": (2, 3, 5)}


class Accuracy(Effects):
    """A result that shows values."""

    draws = "value"


def test_a_subclass_shows_values_with_the_base_as_a_line():
    found = Accuracy(
        {"m": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, {"layer": (0, 1)}, {"m": torch.ones(2)}, span=(0, 1)
    )
    figure = found.plot()
    assert figure.data[0].y == (0.5, 1.0)
    assert figure.data[0].error_y.array == (0.5, 0.0)
    assert figure.layout.shapes[0].y0 == 1.0
    assert figure.layout.yaxis.range[0] == 0
    assert found.standard_error().tolist() == [0.5, 0.0]
    assert isinstance(found.select(layer=[1]).top(1), Accuracy)
    assert str(found).splitlines()[2].split()[0] == "1"


def test_pictures_show_the_change_the_value_or_the_share():
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [5.0]]])
    found = grid(values, base={"m": torch.tensor([1.0])}, sources={"corrupted": {"m": torch.tensor([3.0])}})
    cells = {"change": [[0, 1], [2, 4]], "value": [[1, 2], [3, 5]], "share": [[0, 0.5], [1, 2]]}
    for draws, expected in cells.items():
        assert [list(row) for row in found.plot(draws=draws).data[0].z] == expected
    assert found.plot().data[0].z[1][1] == 4
    assert found.plot(layer=3).data[0].y == (2, 4)
    assert found.plot(layer=[3], position=range(1)).data[0].z[0][0] == 2


def test_html_stands_alone_and_colours_every_known_cell():
    values = torch.tensor([[[1.0], [NAN]], [[-3.0], [0.0]]])
    page = grid(values, texts={"position": ("0 <b>", "1 &")}).to_html()
    assert "<b>" not in page.replace("&lt;b&gt;", "")
    assert "1 &amp;" in page
    assert "http" not in page
    assert page.count("background:") == 3
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page) == ["1.000", "", "-3.000", "0.000"]
    deep = grid(torch.zeros(2, 2, 2, 1)).to_html()
    assert re.findall(r"<caption>([^<]*)</caption>", deep) == ["layer 2", "layer 3"]


def test_what_is_not_there_is_named():
    found = grid(torch.zeros(2, 2, 2, 1))
    with pytest.raises(InvalidArgumentError) as error:
        found.select(layr=2)
    assert str(error.value) == (
        "there is no layr=2\n  expected: layer=[2, 3], position=[0, 1], head=[0, 4]\n  nearest: layer"
    )
    with pytest.raises(InvalidArgumentError, match="there is no head=1"):
        found.plot(head=1)
    with pytest.raises(InvalidArgumentError, match="a picture has one axis or two, and there are 3") as error:
        found.plot()
    assert str(error.value).endswith("fix: plot(head=0)")
    with pytest.raises(InvalidArgumentError, match="the metric of the source run 'clean' is not known"):
        found.normalised()
    with pytest.raises(InvalidArgumentError) as error:
        Effects({"m": torch.zeros(2, 3)}, {"layer": (0, 1, 2)})
    assert str(error.value) == ("the values of 'm' do not fill the axes\n  expected: [layer=3, row]\n  got: [2, 3]")
