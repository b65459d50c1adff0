"""What a process of the zoo raises is the row of its model type."""

from concurrent.futures import Future

import pytest

from clearspan.zoo.census import _row_of


def test_an_error_that_nobody_foresaw_is_the_row_of_its_type():
    future = Future()
    future.set_exception(OSError("no space left"))
    row = _row_of(future, "gpt2")
    assert (row.model_type, row.architecture, row.outcome) == ("gpt2", "GPT2LMHeadModel", "fails")
    assert row.reason == "OSError: no space left"


def test_an_interrupt_ends_the_work():
    future = Future()
    future.set_exception(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        _row_of(future, "gpt2")
