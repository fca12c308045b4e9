"""Timing a call by given clocks: what it took, and what of that a thread waited for a core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lfm2kit.measuring.timing import THREADS, Timing, timed, waits


def account(folder: Path, **waited: int) -> Path:
    """Make a folder of threads as the kernel shows them: run, waited (both in ns), times run."""
    for thread, nanoseconds in waited.items():
        (folder / thread).mkdir()
        (folder / thread / "schedstat").write_text(f"123456 {nanoseconds} 7\n")
    return folder


def one_after_another(*values: Mapping[str, float]) -> Callable[[], Mapping[str, float]]:
    return iter(values).__next__


def call_of_two_seconds(before: Mapping[str, float], after: Mapping[str, float]) -> Timing:
    times = iter([10.0, 12.0])
    return timed(lambda: None, times.__next__, one_after_another(before, after))


def test_waits_are_read_by_thread(tmp_path: Path) -> None:
    assert waits(account(tmp_path, t1=0, t2=2_500_000_000)) == {"t1": 0, "t2": 2.5}


def test_nothing_is_known_where_the_system_keeps_no_account(tmp_path: Path) -> None:
    assert waits(tmp_path / "nowhere") == {}
    (account(tmp_path, t1=1) / "t2").mkdir()  # a thread that ended while this one looked
    assert waits(tmp_path) == {}


@pytest.mark.skipif(not THREADS.exists(), reason="Linux keeps the account")
def test_this_process_has_an_account() -> None:
    assert waits()


def test_the_thread_that_waited_longest_counts() -> None:
    timing = call_of_two_seconds({"t1": 7, "t2": 3}, {"t1": 7.5, "t2": 4.5, "new": 1})
    assert timing == Timing(seconds=2, waited=1.5)


def test_of_a_wait_that_began_earlier_only_the_call_counts() -> None:
    assert call_of_two_seconds({"t1": 0}, {"t1": 60}) == Timing(seconds=2, waited=2)


@pytest.mark.parametrize(("before", "after"), [({}, {}), ({}, {"t1": 9}), ({"t1": 9}, {})])
def test_without_an_account_the_waiting_is_not_known(
    before: Mapping[str, float], after: Mapping[str, float]
) -> None:
    assert call_of_two_seconds(before, after) == Timing(seconds=2, waited=None)
