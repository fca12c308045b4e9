"""Forwards in steps: one by itself, or two alternately, and the calls made beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lfm2kit.aside import InOrder
from lfm2kit.pending import Over, Pending
from lfm2kit.steps import Steps, alternately, finished, stepped, timed


class Doubling:
    """A block that leaves the doubling to others, and counts its halves."""

    def __init__(self, events: list[str], name: str = "") -> None:
        self.events, self.name = events, name

    def steps(self, x: int) -> Steps[int]:
        self.events.append(f"{self.name} begins")
        doubled = yield lambda forward: 2 * x + 100 * forward
        self.events.append(f"{self.name} goes on")
        return doubled + 1


def twice(block: Any, x: int) -> Steps[int]:
    x = yield from stepped(block, x)
    return (yield from stepped(block, x))


def test_a_forward_by_itself_makes_its_calls_in_order_as_forward_0() -> None:
    events: list[str] = []
    assert finished(twice(Doubling(events), 5)) == 23
    assert events == [" begins", " goes on", " begins", " goes on"]


def test_a_block_without_steps_is_called() -> None:
    assert finished(twice(lambda x: x + 1, 5)) == 7


def test_a_timed_forward_has_a_time_for_each_call_and_the_work_before_it() -> None:
    result, times = timed(twice(Doubling([]), 5))
    assert (result, len(times.computing), len(times.calls)) == (23, 2, 2)


def test_one_forward_computes_while_the_others_call_is_under_way() -> None:
    events: list[str] = []

    class Later(Over):
        def end(self) -> Any:
            events.append("ended")
            return super().end()

    def begin(call: Callable[[], Any]) -> Pending:
        events.append("begun")
        return Later(call())

    forwards = [twice(Doubling(events, name), 0) for name in "ab"]
    assert alternately(forwards, begin) == [2 * 101 + 101, 2 * 201 + 201]
    assert events == [
        "a begins", "begun", "b begins", "begun",
        "ended", "a goes on", "a begins", "begun", "ended", "b goes on", "b begins", "begun",
        "ended", "a goes on", "ended", "b goes on",
    ]  # fmt: skip


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
