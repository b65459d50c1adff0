import base64
import gzip
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clearspan.errors import InvalidArgumentError
from clearspan.view.packing import Quantised, packed


def unpacked(text):
    """Reads a packed document as `drawings/data.js` does."""
    content = gzip.decompress(base64.b64decode(text))
    [length] = struct.unpack_from("<I", content)
    body = content[4 + length :]

    def revived(entry):
        return tensor(entry["$tensor"], body) if "$tensor" in entry else entry

    return json.loads(content[4 : 4 + length], object_hook=revived)


def tensor(kept, body):
    *others, last = kept["shape"]
    rows, columns = torch.tril_indices(last, last) if kept["isTriangular"] else (None, None)
    dtype = {8: torch.uint8, 16: torch.uint16}[kept["bits"]]
    held = [*others[:-1], len(rows)] if kept["isTriangular"] else kept["shape"]
    count = torch.Size(held).numel()
    if not count:
        return torch.zeros(kept["shape"])
    codes = torch.frombuffer(bytearray(body), dtype=dtype, offset=kept["offset"], count=count).to(torch.float64)
    missing = 2 ** kept["bits"] - 1
    step = (kept["high"] - kept["low"]) / (missing - 1)
    values = torch.where(codes == missing, torch.nan, kept["low"] + codes * step).reshape(held)
    if not kept["isTriangular"]:
        return values
    whole = torch.full(kept["shape"], kept["low"], dtype=torch.float64)
    whole[..., rows, columns] = values
    return whole


@given(
    values=st.lists(st.floats(-4, 4, width=32) | st.just(float("nan")), min_size=1, max_size=40),
    bits=st.sampled_from([8, 16]),
)
def test_values_come_back_within_half_a_step(values, bits):
    given = torch.tensor(values)
    found = unpacked(packed({"kept": Quantised(given, -4, 4, bits)}))["kept"]
    step = 8 / (2**bits - 2)
    torch.testing.assert_close(found, given.double(), rtol=0, atol=step / 2 + 1e-9, equal_nan=True)


@pytest.mark.parametrize("bits", [8, 16])
def test_ends_middle_and_missing_values_are_exact(bits):
    given = torch.tensor([-0.7, 0.0, 0.7, torch.nan])
    found = unpacked(packed([Quantised(given, -0.7, 0.7, bits)]))[0]
    torch.testing.assert_close(found, given.double(), rtol=0, atol=1e-7, equal_nan=True)
    assert found[1].abs() < 1e-12


def test_what_lies_outside_is_brought_to_the_nearer_end():
    found = unpacked(packed([Quantised(torch.tensor([-5.0, 9.0, torch.inf]))]))[0]
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 1.0]).double(), rtol=0, atol=1e-12)


def test_a_triangle_comes_back_and_takes_half_the_room():
    given = torch.rand(2, 3, 40, 40).tril()
    given[1] = torch.nan
    whole, half = Quantised(given, bits=8), Quantised(given, bits=8, is_triangular=True)
    found = unpacked(packed({"a": half}))["a"]
    torch.testing.assert_close(found.tril(), given.double().tril(), rtol=0, atol=1 / 508 + 1e-6, equal_nan=True)
    assert not found.nan_to_num().triu(1).any()
    assert len(half.to_bytes()) == 6 * 40 * 41 // 2
    assert len(whole.to_bytes()) == 6 * 1600


def test_tensors_of_both_widths_lie_one_after_the_other():
    one, two = torch.rand(3), torch.rand(2, 2)
    found = unpacked(packed({"a": Quantised(one, bits=8), "b": [Quantised(two)], "ids": torch.tensor([[5, 7]])}))
    torch.testing.assert_close(found["a"], one.double(), rtol=0, atol=1 / 508)
    torch.testing.assert_close(found["b"][0], two.double(), rtol=0, atol=1e-5)
    assert found["ids"] == [[5, 7]]


def test_text_comes_back_as_it_was():
    text = "</script>\"'\u202e\u2066 <!-- ⏎ \\"
    content = packed({"text": text})
    assert unpacked(content) == {"text": text}
    assert not set(content) & set("<>&\"'")


def test_the_same_document_is_packed_to_the_same_text():
    assert packed({"a": Quantised(torch.ones(3))}) == packed({"a": Quantised(torch.ones(3))})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "there is no code of 4 bits"),
        ({"low": 1.0}, "no values lie from 1.0 to 1.0"),
        ({"is_triangular": True}, "a triangle is half of a square"),
    ],
)
def test_codes_that_there_are_none_of(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Quantised(torch.zeros(2, 3), **options)


def test_what_no_page_holds():
    with pytest.raises(TypeError, match="a page holds no set"):
        packed({"a": {1}})  # pyright: ignore[reportArgumentType]
