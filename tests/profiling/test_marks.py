"""Spans within spans: a second is counted once."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2kit.memory import HOST
from lfm2kit.profiling import marks
from lfm2kit.profiling.marks import Marks, What, finest

LAYER, WAIT, INNER = What("layers.0"), What("layers.0.choice", kind="wait for host"), What("inner")


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that notes moments at times of its own, and returns the spans."""
    now = [0.0]
    monkeypatch.setattr(marks.time, "perf_counter", lambda: now[0])

    def spans(*moments: tuple[float, What, bool]) -> list[tuple[str, float, float, float]]:
        made = Marks([HOST])
        now[0] = 10.0
        with made.of_a_forward():
            for seconds, what, is_end in moments:
                now[0] = 10 + seconds
                made.note(HOST, what, is_end=is_end)
        found = list(made.spans())
        assert {span.memory for span in found} == {"host"}
        return [(span.name, span.begin, span.seconds, span.own) for span in found]

    return spans


def test_a_span_has_its_own_seconds_without_those_within(noted: Any) -> None:
    assert noted(
        (1, LAYER, False), (2, WAIT, False), (5, WAIT, True), (6, INNER, False), (8, INNER, True),
        (9, LAYER, True),
    ) == [
        ("layers.0.choice.wait", 2, 3, 3), ("inner", 6, 2, 2), ("layers.0", 1, 8, 3),
    ]  # fmt: skip


def test_a_part_has_no_seconds_of_a_wait_within_it(noted: Any) -> None:
    norm, router = LAYER._replace(part="norm"), LAYER._replace(part="router")
    assert noted(
        (0, LAYER, False), (1, norm, True), (2, WAIT, False), (6, WAIT, True), (7, router, True),
        (8, LAYER, True),
    ) == [
        ("layers.0.norm", 0, 1, 1), ("layers.0.choice.wait", 2, 4, 4), ("layers.0.router", 1, 6, 2),
        ("layers.0", 0, 8, 4),
    ]  # fmt: skip


def test_calls_that_are_begun_beside_each_other_may_end_in_any_order(noted: Any) -> None:
    first, second = What("first"), What("second")
    moments = ((0, first, False), (1, second, False), (3, first, True), (4, second, True))
    assert [span[:3] for span in noted(*moments)] == [("first", 0, 3), ("second", 1, 3)]


def test_waits_are_shown_beside_the_parts_of_blocks() -> None:
    made = Marks([HOST])
    with made.of_a_forward():
        for what, is_end in (
            (LAYER, False), (WAIT, False), (WAIT, True), (LAYER._replace(part="all"), True),
            (LAYER, True),
        ):  # fmt: skip
            made.note(HOST, what, is_end=is_end)
    shown = [span.name for span in finest(made.spans())]
    assert shown == ["layers.0.choice.wait", "layers.0.all"]


def test_a_host_mark_of_an_earlier_forward_is_not_shown_again() -> None:
    """A block on the host that a replay calls in another way is not called through its marks."""
    made = Marks([HOST])
    with made.of_a_forward():
        made.note(HOST, INNER, is_end=False)
        made.note(HOST, INNER, is_end=True)
    with made.of_a_forward():
        pass
    assert list(made.spans()) == []
