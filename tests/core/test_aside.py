"""Calls beside the thread that begins them are made one after the other."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lfm2kit.aside import InOrder


def test_calls_are_made_in_the_order_in_which_they_are_begun_and_leave_no_thread() -> None:
    line, made, may_go_on = InOrder(), [], threading.Event()
    before = threading.active_count()
    first = line.begin(lambda: may_go_on.wait(60))
    others = [line.begin(lambda i=i: made.append(i)) for i in range(5)]
    assert made == []
    may_go_on.set()
    assert first.end()
    assert [one.end() for one in others] == [None] * 5
    assert made == list(range(5))
    for thread in threading.enumerate():
        if thread.name == "exchange":
            thread.join(60)
    assert threading.active_count() == before


def test_after_a_call_that_raises_no_other_is_made() -> None:
    line, made = InOrder(), []

    def fails() -> None:
        raise RuntimeError("a rank has gone")

    first, second = line.begin(fails), line.begin(lambda: made.append(1))
    for call in first, second:
        with pytest.raises(RuntimeError, match="a rank has gone"):
            call.end()
    assert made == []


def test_calls_know_what_the_caller_wants_done_about_infinite_numbers() -> None:
    line, infinite = InOrder(), np.array([np.inf])
    with np.errstate(invalid="raise"):
        call = line.begin(lambda: infinite - infinite)
        with pytest.raises(FloatingPointError):
            call.end()
