import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from clearspan.plots import Box, Link, Network

BOXES = {"a": Box("a & b", 40, 20), "b": Box("middle", 40, 80), "c": Box("top", 40, 140), "d": Box("aside", 140, 140)}
SVG = "{http://www.w3.org/2000/svg}"


def network(*links):
    return Network(BOXES, links, {"what it is": "#215f86"})


def test_a_link_goes_from_the_top_of_one_box_to_the_bottom_of_another():
    ((_, curve),) = network(Link("a", "b", 1.0)).curves
    assert curve[0] == (40, 32)
    assert curve[-1] == (40, 68)


def test_a_link_goes_around_a_box_that_is_in_its_way():
    curves = network(Link("a", "c", 1.0), Link("a", "b", 0.5)).curves
    (_, around), (_, straight) = curves
    assert around[1][0] > around[0][0] + 50
    assert straight[1][0] == straight[0][0]


def test_links_leave_a_box_side_by_side_in_the_order_of_what_they_go_to():
    curves = network(Link("a", "d", 1.0), Link("a", "c", 0.5), Link("a", "b", None)).curves
    (_, right), (_, left), (_, dotted) = curves
    assert left[0][0] < 40 < right[0][0]
    assert dotted[0][0] == 40


def test_the_picture_is_well_formed_and_shows_text_as_it_is():
    picture = network(
        Link("a", "d", 1.0, text="a -> d"), Link("a", "c", 0.0, is_dashed=True), Link("a", "b", None)
    ).svg()
    root = ElementTree.fromstring(picture)
    assert [element.text for element in root.iter(f"{SVG}text")] == ["a & b", "middle", "top", "aside", "what it is"]
    assert [element.text for element in root.iter(f"{SVG}title")] == ["a -> d", None, None]
    paths = list(root.iter(f"{SVG}path"))
    assert [path.get("stroke-width") for path in paths] == ["8.2", "1.2", "1.2", "4"]
    assert [path.get("stroke-dasharray") for path in paths] == [None, "8 5", "2 4", None]


def test_the_figure_has_the_same_curves():
    drawn = network(Link("a", "d", 1.0, text="a to d"), Link("b", "c", 0.5))
    figure = replace(drawn, title="title").figure()
    assert figure.layout.title.text == "title"
    paths = [shape.path for shape in figure.layout.shapes if shape.type == "path"]
    assert paths[0] == "M 40.0 32.0 C 40.0 80.0, 140.0 80.0, 140.0 128.0"
    assert figure.data[1].text == ("a to d",)
    assert figure.data[1].x[0] == pytest.approx((drawn.curves[0][1][0][0] + 140) / 2, abs=1)
    assert [trace.name for trace in figure.data[2:]] == ["what it is"]
