"""The checks of a transport's jobs catch launchers that break their contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pytest

from lfm2kit.errors import BUG, Lfm2kitError
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.testing.jobs import JOB_CHECKS, exit_code_of, joined, judged, run_on_rank, selected
from lfm2kit.testing.threads import Meeting
from lfm2kit.transport import JobError, World

OF_PROCESSES = {"early-end", "hang"}  # which threads cannot do without their process
Launch = Callable[[], int]


def on_threads(name: str, make: Any = ThreadTransport) -> int:
    """Return the exit code of a job whose ranks are threads."""

    def rank(transport: ThreadTransport) -> int:
        run_on_rank(name, transport)
        return exit_code_of(name, transport)

    return run_ranks(3, rank, make=make)[0]


@pytest.mark.parametrize("name", [name for name in JOB_CHECKS if name not in OF_PROCESSES])
def test_a_launcher_that_keeps_the_contract_passes(name: str) -> None:
    result = judged(name, lambda: on_threads(name))
    assert (result.verdict, result.detail) == ("passed", "")


class Unnumbered(ThreadTransport):
    """Gives every rank the place of the first one on its machine."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting)
        self.world = World(rank, meeting.size, 3, 3)


class Unsorted(ThreadTransport):
    """Gathers the rows of the last rank first."""

    def gather(self, rows: Any, *more: Any) -> Any:
        everyone = super().gather(rows, *more)
        return None if everyone is None else everyone[::-1]


class Nameless(ThreadTransport):
    """Ends the job without the reason."""

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        raise JobError("a rank has failed", exit_code)


class Harsh(ThreadTransport):
    """Takes every reason for a bug."""

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        raise JobError(reason, BUG)


@pytest.mark.parametrize(
    ("name", "transport", "says"),
    [
        ("places", Unnumbered, "local_rank 3 and local_size 3"),
        ("places", Unsorted, "3 ranks gathered their numbers as [2, 1, 0]"),
        ("collectives", Unsorted, "gather did not return every rank's rows in order of rank"),
        ("abort", Nameless, "launch raised JobError('a rank has failed', 2)"),
        ("abort", Harsh, "launch raised JobError('this rank gives up', 3)"),
    ],
)
def test_a_broken_transport_fails(name: str, transport: Any, says: str) -> None:
    result = judged(name, lambda: on_threads(name, transport))
    assert result.verdict == "failed"
    assert says in result.detail


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exit-code", "rank 0 finished with 5, but launch returned 0"),
        ("abort", "launch returned 0, although the last rank called abort"),
        ("early-end", "launch returned 0, although the last rank's process ended before finish"),
        ("hang", "launch returned 0, although the last rank made no progress for more than 2 s"),
    ],
)
def test_a_launcher_that_calls_every_end_good_fails(name: str, says: str) -> None:
    result = judged(name, lambda: 0)
    assert result.verdict == "failed"
    assert says in result.detail


def raising(error: Exception) -> Launch:
    def launch() -> NoReturn:
        raise error

    return launch


def test_whatever_a_launcher_raises_is_a_verdict_but_what_the_user_must_change() -> None:
    assert judged("places", raising(JobError("rank 1: no", BUG))).detail == "rank 1: no"
    result = judged("places", raising(OSError("no program\nat all")))
    assert (result.verdict, result.detail) == ("failed", "launch raised OSError: no program")
    with pytest.raises(Lfm2kitError, match="install it"):
        judged("places", raising(Lfm2kitError("install it")))


def test_a_job_that_does_not_end_is_interrupted() -> None:
    def launch() -> int:
        time.sleep(60)
        return 0

    result = judged("hang", launch, patience=0.1 - JOB_CHECKS["hang"].deadline)
    assert (result.verdict, result.detail) == ("failed", "the job had not ended after 0.1 s")


class OfAnotherSize:
    """A launcher whose ranks believe to be of a smaller job."""

    def world_size(self) -> int | None:
        return 2

    def launch(self, ranks: int, arguments: Sequence[str]) -> int:
        return 0

    def connect(self) -> ThreadTransport:
        return ThreadTransport(0, Meeting((0, 0), 1.0))


def test_a_job_of_another_size_is_a_breach() -> None:
    with pytest.raises(
        JobError, match=r"world_size\(\) says 2 and world.size 2 in a job of 3 ranks"
    ):
        joined(OfAnotherSize(), 3)


def test_unknown_checks_are_named() -> None:
    assert selected(["abort", " places"]) == ["places", "abort"]
    with pytest.raises(Lfm2kitError, match="unknown check 'abrt'"):
        selected(["abrt"])
