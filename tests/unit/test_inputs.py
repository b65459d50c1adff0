"""Batches: all kinds of input, and positions among real tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearspan.errors import InputError, InvalidArgumentError, NoTokenizerError, TokenRangeError
from clearspan.inputs import Batch

IDS = [[5, 6, 7], [8, 9, 4]]
RAGGED = [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        np.array(IDS),
        IDS,
        [tuple(row) for row in IDS],
        [torch.tensor(row) for row in IDS],
        {"input_ids": IDS, "attention_mask": [[1, 1, 1], [1, 1, 1]]},
        [{"input_ids": row, "attention_mask": [1, 1, 1]} for row in IDS],
        Batch(torch.tensor(IDS)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_ids_in_all_their_forms_are_one_batch(bridge, given):
    batch = bridge.to_batch(given)
    assert batch.ids.tolist() == IDS
    assert batch.mask is None
    assert batch.lengths.tolist() == [3, 3]
    torch.testing.assert_close(bridge(given), bridge(torch.tensor(IDS)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "given",
    [
        RAGGED,
        [{"input_ids": row} for row in RAGGED],
        {"input_ids": [[5, 6, 7], [8, 9, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]},
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in RAGGED],
    ],
    ids=lambda given: type(given).__name__,
)
def test_rows_of_different_length_are_padded(bridge, given):
    batch = bridge.to_batch(given)
    assert batch.lengths.tolist() == [3, 2]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    logits = bridge(given)
    torch.testing.assert_close(logits[1:, :2], bridge([8, 9]), rtol=1e-5, atol=1e-5)


def test_one_row_of_ids(bridge):
    for form in ([5, 6, 7], torch.tensor([5, 6, 7]), np.array([5, 6, 7])):
        assert bridge.to_batch(form).ids.tolist() == [[5, 6, 7]]


def test_texts_rows_of_a_dataset_and_messages(embedded):
    texts = ["import os", "x = 1, 2"]
    expected = embedded.to_batch(texts)
    assert expected.texts == tuple(texts)
    for form in ([{"text": text} for text in texts], {"text": texts, "label": [0, 1]}, tuple(texts)):
        batch = embedded.to_batch(form)
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.mask, expected.mask)
    encoded = embedded.tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(embedded.to_batch(encoded).ids, encoded["input_ids"])
    messages = [{"role": "user", "content": "import os"}]
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        embedded.to_batch(messages)
    embedded.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    try:
        assert (
            embedded.to_batch(messages).ids.tolist() == embedded.to_batch("import os\n", prepend_bos=False).ids.tolist()
        )
        assert embedded.to_batch([messages, messages]).rows == 2
    finally:
        embedded.tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, InputError, "cannot run this input"),
        (3, InputError, "cannot run this input"),
        (b"import", InputError, "cannot run this input"),
        ([], InputError, "an empty list has no rows"),
        ([[]], InputError, "a row of token ids is a list of whole numbers, not empty"),
        ([[1.5]], InputError, "a row of token ids is a list of whole numbers"),
        (["a", 3], InputError, "cannot run this input"),
        ([True, False], InputError, "cannot run this input"),
        (torch.tensor([[True]]), InputError, "token ids are whole numbers"),
        (torch.zeros(2, 0, dtype=torch.long), InputError, "token ids have two axes"),
        (torch.zeros(1, 1, 1, dtype=torch.long), InputError, "token ids have two axes"),
        (torch.zeros(2, 3), InputError, "a tensor of numbers is taken as embeddings"),
        ({"labels": [1]}, InputError, "a mapping is no input without ids or text\n  expected: input_ids"),
        ([[1, 2], [500, 3]], TokenRangeError, "token ids outside the vocabulary"),
        ("text", NoTokenizerError, "this bridge has no tokenizer"),
    ],
)
def test_what_is_no_input_is_named(bridge, given, error, message):
    with pytest.raises(error) as raised:
        bridge.to_batch(given)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], "the attention mask does not fit the input\n  expected: [2, 3], or four axes\n  got: [1, 2]"),
        ([[1, 2, 1], [1, 1, 1]], "the attention mask is not one of padding"),
        ([[1, 1, 1], [0, 0, 0]], "row 1 has no real token"),
        ("ones", "the attention mask is no tensor"),
    ],
)
def test_masks_that_do_not_fit(bridge, mask, message):
    with pytest.raises(InputError) as raised:
        bridge.to_batch(IDS, mask)
    assert str(raised.value).startswith(message)
    with pytest.raises(InvalidArgumentError, match="a Batch has a mask of its own"):
        bridge.to_batch(Batch(torch.tensor(IDS)), torch.ones(2, 3))


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    masks = [draw(st.lists(st.integers(0, 1), min_size=width, max_size=width).filter(any)) for _ in range(rows)]
    tokens = torch.arange(rows * width).reshape(rows, width)
    mask = torch.tensor(masks)
    return Batch(tokens, None if bool(mask.all()) else mask)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_positions_count_real_tokens_and_skip_holes(batch):
    for row in range(batch.rows):
        real = [int(one) for one, there in zip(batch.ids[row], batch.real[row], strict=True) if there]
        read = [int(batch.ids[row, batch.column_of(row, position)]) for position in range(len(real))]
        assert read == real
        back = [int(batch.ids[row, batch.column_of(row, position)]) for position in range(-len(real), 0)]
        assert back == real
        for outside in (len(real), -len(real) - 1):
            with pytest.raises(InvalidArgumentError, match=f"row {row} has no position {outside}"):
                batch.column_of(row, outside)
    rows, columns, places = batch.places(None)
    assert torch.equal(batch.ids[rows, columns], batch.ids[batch.real.bool()])
    assert len(places) == int(batch.real.sum())


@settings(max_examples=60, deadline=None)
@given(batches(), st.data())
def test_a_batch_laid_out_as_another_keeps_its_tokens(batch, data):
    width = data.draw(st.integers(batch.longest, batch.longest + 3))
    columns = [sorted(data.draw(st.permutations(range(width)))[: len(real)]) for real in batch.real_columns]
    mask = torch.zeros(batch.rows, width, dtype=torch.long)
    for row, own in enumerate(columns):
        mask[row, own] = 1
    other = Batch(torch.zeros_like(mask), None if bool(mask.all()) else mask)
    moved = batch.laid_out_as(other)
    assert moved.real_columns == other.real_columns
    for row in range(batch.rows):
        assert moved.ids[row, list(moved.real_columns[row])].tolist() == (
            batch.ids[row, list(batch.real_columns[row])].tolist()
        )
    back = moved.laid_out_as(batch)
    assert torch.equal(back.ids * back.real, batch.ids * batch.real)


@settings(max_examples=40, deadline=None)
@given(batches(), st.integers(1, 3))
def test_splitting_loses_no_real_token(batch, size):
    parts = list(batch.split(size))
    assert sum(part.rows for part in parts) == batch.rows
    found = [row for part in parts for row in (part.ids[i, list(c)].tolist() for i, c in enumerate(part.real_columns))]
    assert found == [batch.ids[i, list(c)].tolist() for i, c in enumerate(batch.real_columns)]
    assert all(part.mask is None or part.mask.any(0)[[0, -1]].all() for part in parts)


def test_positions_by_row_and_slices():
    batch = Batch(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]]))
    assert batch.positions(-1) == [[1], [2]]
    assert batch.positions([[0], [0, -1]]) == [[0], [0, 2]]
    assert batch.positions(slice(1, None)) == [[1], [1, 2]]
    with pytest.raises(InvalidArgumentError, match="row 0 has no position in slice"):
        batch.positions(slice(2, None))
    with pytest.raises(InvalidArgumentError, match="positions are not one list for each row"):
        batch.positions([[0]])
    with pytest.raises(InvalidArgumentError) as error:
        batch.laid_out_as(Batch(torch.zeros(2, 3, dtype=torch.long)))
    assert str(error.value) == (
        "the two inputs do not lie position on position\n  expected: as many rows, and as many real tokens in each\n"
        "  got: [2, 3] and [3, 3] real tokens"
    )


def test_a_hole_in_the_mask_is_skipped_by_the_loss(bridge):
    tokens, mask = torch.tensor([[5, 0, 6, 7, 0]]), torch.tensor([[1, 0, 1, 1, 0]])
    found = bridge(tokens, return_type="loss", attention_mask=mask)
    torch.testing.assert_close(found, bridge([[5, 6, 7]], return_type="loss"), rtol=1e-5, atol=1e-5)
