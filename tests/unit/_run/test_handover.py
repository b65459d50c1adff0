"""A handover runs its function only while somebody waits, and ends it when nobody does any more."""

import contextvars
import os
import signal
import threading

import pytest

from clearspan._run.handover import Handover


def alive() -> bool:
    return any(thread.name == "clearspan-handover" for thread in threading.enumerate())


def test_the_function_runs_only_while_an_item_is_waited_for():
    order = []

    def function(hand):
        for number in range(3):
            order.append(f"made {number}")
            hand(number)
        order.append("ended")

    handover = Handover(function)
    assert order == []
    for number in handover:
        order.append(f"got {number}")
    assert order == ["made 0", "got 0", "made 1", "got 1", "made 2", "got 2", "ended"]
    assert list(handover) == []


def test_what_the_function_raises_is_raised_once():
    def function(hand):
        hand(1)
        raise KeyError("here")

    handover = Handover(function)
    assert next(handover) == 1
    with pytest.raises(KeyError, match="here"):
        next(handover)
    assert list(handover) == []


def test_an_error_may_be_an_item():
    error = ValueError()
    assert list(Handover(lambda hand: hand(error))) == [error]


@pytest.mark.parametrize("items", [0, 1, 3])
def test_closing_ends_the_function_and_runs_its_finally(items):
    order = []

    def function(hand):
        try:
            for number in range(3):
                hand(number)
        finally:
            order.append("left")

    handover = Handover(function)
    for _ in range(items):
        next(handover)
    handover.close()
    handover.close()
    assert order == (["left"] if items else [])
    assert not alive()
    assert list(handover) == []


def test_an_interrupt_of_the_one_who_waits_ends_the_function():
    """The function itself sends the signal, so that it comes while the other thread waits."""
    order = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def function(hand):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.2)
        hand(1)
        order.append("went on")

    handover = Handover(function)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(handover)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not alive()
    assert order == []


def test_context_variables_are_those_of_the_one_who_made_it():
    variable = contextvars.ContextVar("variable", default="unset")
    token = variable.set("set")
    handover = Handover(lambda hand: hand(variable.get()))
    variable.reset(token)
    assert list(handover) == ["set"]
