"""Ranks that are threads of one process: they keep the contract, and none waits for ever."""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
import pytest

from lfm2kit.testing import ThreadTransport, check_transport, run_ranks
from lfm2kit.testing.threads import Ended, Meeting, _results
from lfm2kit.transport import JobError, World

WAITS_BRIEFLY = 0.2  # seconds


@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_the_collective_operations_are_those_of_a_transport(size: int) -> None:
    run_ranks(size, check_transport)


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert run_ranks(3, lambda transport: transport.world) == [
        World(rank, 3, rank, 3, (0, 0, 0)) for rank in range(3)
    ]


def test_ranks_may_be_said_to_be_on_several_machines() -> None:
    worlds = run_ranks(3, lambda transport: transport.world, nodes=[8, 3, 8])
    assert worlds == [
        World(0, 3, 0, 2, (0, 1, 0)), World(1, 3, 0, 1, (0, 1, 0)), World(2, 3, 1, 2, (0, 1, 0)),
    ]  # fmt: skip
    assert worlds[2].within([1, 2]) == World(1, 2, 0, 1, (0, 1))
    with pytest.raises(ValueError, match=r"the machine of each of 3 ranks, not \[0\]"):
        run_ranks(3, lambda transport: None, nodes=[0])


def test_a_rank_that_raises_ends_those_that_wait_for_others_in_a_group() -> None:
    def rank(transport: ThreadTransport) -> None:
        if transport.world.rank == 2:
            raise ValueError("no such token")
        pair = transport.group([0, 1] if transport.world.rank < 2 else [2, 3])
        while True:
            pair.barrier()

    with pytest.raises(ValueError, match="no such token"):
        run_ranks(4, rank)


def test_what_a_rank_sends_may_change_afterwards() -> None:
    def rank(transport: ThreadTransport) -> Any:
        rows = np.full((2, 1), transport.world.rank)
        received, _ = transport.all_to_all(rows, [1, 1])
        rows[:] = 9
        transport.barrier()
        return received.ravel().tolist()

    assert run_ranks(2, rank) == [[0, 1], [0, 1]]


def test_a_rank_that_raises_ends_the_others_which_wait_for_it() -> None:
    def rank(transport: ThreadTransport) -> None:
        if transport.world.rank == 1:
            raise ValueError("no such token")
        while True:
            transport.barrier()

    with pytest.raises(ValueError, match="no such token") as raised:
        run_ranks(3, rank)
    assert raised.value.__notes__ == ["on rank 1 of 3"]


def test_an_aborting_rank_ends_the_others_with_its_reason() -> None:
    def rank(transport: ThreadTransport) -> None:
        if transport.world.rank == 0:
            transport.abort(2, "out of memory")
        transport.barrier()

    with pytest.raises(JobError, match="rank 0 of 2: out of memory") as raised:
        run_ranks(2, rank)
    assert raised.value.exit_code == 2


def test_a_rank_that_ends_early_or_calls_something_else_is_named() -> None:
    def rank(transport: ThreadTransport) -> None:
        if transport.world.rank == 1:
            transport.barrier()

    with pytest.raises(JobError, match="rank 0 in its end, rank 1 in barrier"):
        run_ranks(2, rank)


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    never = threading.Event()

    def rank(transport: ThreadTransport) -> None:
        if transport.world.rank == 1:
            never.wait()
        transport.barrier()

    with pytest.raises(JobError, match=r"no word within 0.2 s from the ranks \[1\] of 2"):
        run_ranks(2, rank, patience=WAITS_BRIEFLY)
    never.set()


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_that_hang_outside_an_operation_are_ended(size: int) -> None:
    never = threading.Event()
    late = list(range(size))
    with pytest.raises(JobError) as raised:
        run_ranks(size, lambda transport: never.wait(), patience=WAITS_BRIEFLY)
    assert str(raised.value) == f"no word within 0.2 s from the ranks {late} of {size}"
    never.set()


def test_ranks_that_come_now_and_then_are_waited_for() -> None:
    meeting = Meeting([0], WAITS_BRIEFLY)

    class Slow(queue.SimpleQueue[Ended]):
        """Has nothing for longer than the patience, three times, while the rank goes on."""

        def get(self, block: bool = True, timeout: float | None = None) -> Ended:
            if meeting.words == 3:
                return Ended(0, "done", None)
            meeting.swap(0, "barrier", None)
            raise queue.Empty

    assert _results(meeting, Slow(), WAITS_BRIEFLY) == ["done"]


@pytest.mark.parametrize("size", [0, -1, "2", None, 1.5, True])
def test_no_ranks_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"needs 1 rank or more, not {size!r}"):
        run_ranks(size, lambda transport: None)
    with pytest.raises(ValueError, match="calls a function for each rank, which 7 is not"):
        run_ranks(1, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [[4], [1, 1, 2], [1, 1], [3, 9], [-1, 5]])
def test_counts_that_do_not_fit_the_rows_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"send_counts is .*, for 4 rows and 2 ranks"):
        run_ranks(2, lambda transport: transport.all_to_all(np.zeros((4, 2)), counts))


def test_rows_that_do_not_come_as_expected_are_refused() -> None:
    rows = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"receive_counts is \[3, 1\], but \[2, 2\] rows came"):
        run_ranks(2, lambda transport: transport.all_to_all(rows, [2, 2], [3, 1]))
    with pytest.raises(ValueError, match=r"gather: counts is \[3, 4\], but \[4, 4\] rows came"):
        run_ranks(2, lambda transport: transport.gather(rows, [3, 4]))


@pytest.mark.parametrize("other", [np.zeros((4, 3)), np.zeros((4, 2), np.int32)])
@pytest.mark.parametrize("operation", ["all_to_all", "gather"])
def test_rows_of_different_forms_are_refused(operation: str, other: Any) -> None:
    def rank(transport: ThreadTransport) -> Any:
        rows = other if transport.world.rank == 1 else np.zeros((4, 2))
        counts = [[2, 2]] if operation == "all_to_all" else []
        return getattr(transport, operation)(rows, *counts)

    with pytest.raises(JobError, match=r"rank 0 has float64 \[2\], rank 1 has"):
        run_ranks(2, rank)
