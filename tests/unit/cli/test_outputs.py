import math

from tests.unit.cli.running import as_json

from clearspan.cli.outputs import json_of, page


def test_what_is_no_finite_number_is_null_in_json():
    data = {"a": math.nan, "b": [1.5, -math.inf], "c": (True, 2, "x", None)}
    assert as_json(json_of(data)) == {"a": None, "b": [1.5, None], "c": [True, 2, "x", None]}


def test_a_title_is_no_markup():
    assert "<title>&lt;script&gt;</title>" in page("<script>", "")
