"""A transport whose ranks are threads of one process: several ranks in a test, in milliseconds.

    def rank(transport):
        model = set_up(checkpoint, plan, transport=transport).build()
        return model.logits(batches[transport.world.rank])

    logits = run_ranks(3, rank)  # what each rank returned

Every rank builds blocks of its own, so a backend needs to bear several threads to be used in this
way.  Whatever happens to a rank, no other one waits for it for ever.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from reprlib import repr as brief  # of what a caller gives, however long it is
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from lfm2kit.aside import InOrder
from lfm2kit.errors import BUG
from lfm2kit.pending import Pending
from lfm2kit.transport import JobError, World

T = TypeVar("T")

PATIENCE = 300.0  # seconds without a word of a rank: a kernel may have to be compiled meanwhile


class OthersEnded(Exception):  # noqa: N818 (a consequence, not an error)
    """The error in a rank that waits for one which has failed, or does not come."""


class ThreadTransport:
    """The collective operations of `lfm2kit.transport.Transport`, between threads.

    `everyones` gives all ranks' values of any type: what an exchange for a test can be made of.
    """

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.world = World.of(rank, meeting.nodes)
        self._meeting = meeting
        self._asides: dict[str, ThreadAside] = {}

    def group(self, ranks: Sequence[int]) -> ThreadTransport:
        """Return a transport of this one's type among `ranks` alone, as `FormsGroups` asks."""
        group = copy.copy(self)
        group.world = self.world.within(ranks)
        group._meeting = self._meeting.group(tuple(ranks), group.world.nodes)
        group._asides = {}
        return group

    def aside(self, purpose: str) -> ThreadAside | None:
        """Return this transport for calls beside the caller's work, as `WorksAside` asks."""
        if purpose not in self._asides:
            meeting = self._meeting.group(purpose, self._meeting.nodes)
            self._asides[purpose] = ThreadAside(self.world.rank, meeting)
        return self._asides[purpose]

    def everyones(self, value: Any, operation: str = "everyones") -> list[Any]:
        """Return the value that each rank brings to this call, in order of rank.

        The values are not copied: a rank that changes its own one must wait in `barrier` first.
        """
        return self._meeting.swap(self.world.rank, operation, value)

    def all_to_all(
        self,
        rows: npt.NDArray[Any],
        send_counts: Sequence[int],
        receive_counts: Sequence[int] | None = None,
        into: npt.NDArray[Any] | None = None,
    ) -> tuple[npt.NDArray[Any], list[int]]:
        counts = self._checked(send_counts, len(rows))
        sent = np.split(rows.copy(), np.cumsum(counts)[:-1])
        everyone = self.everyones(sent, "all_to_all")
        came = [parts[self.world.rank] for parts in everyone]
        _check_alike([parts[0] for parts in everyone])
        came_counts = [len(part) for part in came]
        _check_expected("all_to_all: receive_counts", receive_counts, came_counts)
        return np.concatenate(came, out=into), came_counts

    def _checked(self, send_counts: Sequence[int], rows: int) -> list[int]:
        counts = list(send_counts)
        if len(counts) != self.world.size or min(counts) < 0 or sum(counts) != rows:
            raise ValueError(
                f"all_to_all: send_counts is {counts}, for {rows} rows and {self.world.size} ranks"
            )
        return counts

    def gather(
        self, rows: npt.NDArray[Any], counts: Sequence[int] | None = None
    ) -> npt.NDArray[Any] | None:
        everyone = self.everyones(rows.copy(), "gather")
        _check_alike(everyone)
        _check_expected("gather: counts", counts, [len(part) for part in everyone])
        return np.concatenate(everyone) if self.world.rank == 0 else None

    def shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        """Return memory of this process, as `SharesMemory` asks; None between machines."""
        if len(set(self.world.nodes)) > 1:
            return None
        of_the_first: npt.NDArray[Any] = self.everyones(np.empty(shape, dtype), "shared")[0]
        return of_the_first

    def barrier(self) -> None:
        self.everyones(None, "barrier")

    def finish(self, exit_code: int) -> None:
        """Do nothing: a rank is done when its function returns."""

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        raise JobError(f"rank {self.world.rank} of {self.world.size}: {reason}", exit_code, details)


class ThreadAside(ThreadTransport):
    """A transport between threads whose operations run beside the threads that begin them."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting)
        self._calls = InOrder()

    def begin(self, call: Callable[[], Any]) -> Pending:
        return self._calls.begin(call)


def _check_alike(everyones: Sequence[npt.NDArray[Any]]) -> None:
    """Raise JobError if the rows that the ranks bring differ in type or shape."""
    forms = [f"{rows.dtype} {list(rows.shape[1:])}" for rows in everyones]
    if len(set(forms)) > 1:
        said = ", ".join(f"rank {rank} has {form}" for rank, form in enumerate(forms))
        raise JobError(f"the ranks bring rows of different forms: {said}", BUG)


def _check_expected(name: str, expected: Sequence[int] | None, came: list[int]) -> None:
    """Raise ValueError if other numbers of rows came than a rank expected."""
    if expected is not None and list(expected) != came:
        raise ValueError(f"{name} is {list(expected)}, but {came} rows came")


class Meeting:
    """The place where the ranks of a job meet, to get what each one brings."""

    def __init__(self, nodes: Sequence[int], patience: float) -> None:
        self.nodes, self.size = tuple(nodes), len(nodes)
        self._patience = patience
        self._barrier = threading.Barrier(self.size, timeout=patience)
        self._brought: list[tuple[str, Any]] = [("", None)] * self.size
        self._words = 0
        self._groups: dict[Hashable, Meeting] = {}
        self._making = threading.Lock()
        self._is_over = False

    @property
    def words(self) -> int:
        """Return how often a rank has come, to groups too: it still grows where all is well."""
        return self._words + sum(group.words for group in list(self._groups.values()))

    def group(self, key: Hashable, nodes: Sequence[int]) -> Meeting:
        """Return another place to meet for ranks on `nodes`, the same one for the same key."""
        with self._making:
            if key not in self._groups:
                self._groups[key] = Meeting(nodes, self._patience)
                if self._is_over:
                    self._groups[key].end()
            return self._groups[key]

    def swap(self, rank: int, operation: str, value: Any) -> list[Any]:
        """Return every rank's value; JobError if the ranks are not in the same operation."""
        self._words += 1
        self._brought[rank] = operation, value
        self._wait()
        everyone = list(self._brought)
        self._wait()  # until everyone has looked, nobody brings the next one
        if len({operation for operation, _ in everyone}) > 1:
            said = ", ".join(f"rank {r} in {o}" for r, (o, _) in enumerate(everyone))
            raise JobError(f"the ranks are in different operations: {said}", BUG)
        return [value for _, value in everyone]

    def end(self) -> None:
        """End all waiting, now and later, in groups too."""
        self._barrier.abort()
        with self._making:
            self._is_over = True
            for group in self._groups.values():
                group.end()

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise OthersEnded from None


class Ended(NamedTuple):
    """The end of a rank: what it returned or raised."""

    rank: int
    result: Any
    error: BaseException | None


def run_ranks(
    size: int,
    rank: Callable[[ThreadTransport], T],
    *,
    make: Callable[[int, Meeting], ThreadTransport] = ThreadTransport,
    nodes: Sequence[int] | None = None,
    patience: float = PATIENCE,
) -> list[T]:
    """Run `rank(transport)` in a thread for each of `size` ranks; return what they returned.

    `make` makes a rank's transport, such as a subclass that has an exchange.  `nodes` are the
    machines that the ranks are said to be on, [size], by any numbers; by default all are on one.
    If a rank raises, the others end at their next collective operation, and its error is raised
    here with a note that names the rank.  Raises `JobError` if the ranks do not call the same
    operations, or if one does not come to an operation, or to its end, within `patience` seconds;
    ValueError for a `size` that is not a whole number of 1 or more, `nodes` of another length, and
    a `rank` that is not a function.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"run_ranks needs 1 rank or more, not {brief(size)}")
    if not callable(rank):
        raise ValueError(f"run_ranks calls a function for each rank, which {brief(rank)} is not")
    if nodes is not None and len(nodes) != size:
        raise ValueError(f"run_ranks needs the machine of each of {size} ranks, not {brief(nodes)}")
    meeting = Meeting((0,) * size if nodes is None else nodes, patience)
    ended = queue.SimpleQueue[Ended]()

    def run(transport: ThreadTransport) -> None:
        number, result = transport.world.rank, None
        try:
            result = rank(transport)
            meeting.swap(number, "its end", None)
            ended.put(Ended(number, result, None))
        except BaseException as error:
            meeting.end()
            ended.put(Ended(number, None, error))

    for number in range(size):
        arguments = (make(number, meeting),)
        threading.Thread(target=run, args=arguments, name=f"rank {number}", daemon=True).start()
    try:
        return _results(meeting, ended, patience)
    finally:
        meeting.end()


def _results(meeting: Meeting, ended: queue.SimpleQueue[Ended], patience: float) -> list[Any]:
    """Wait for all ranks, as long as one of them comes to an operation now and then."""
    size = meeting.size
    by_rank: dict[int, Ended] = {}
    is_silent = False
    while len(by_rank) < size:
        has_failed = any(one.error is not None for one in by_rank.values())
        words = meeting.words
        try:
            one = ended.get(timeout=patience)
        except queue.Empty:
            if has_failed or is_silent:
                break
            if meeting.words == words:
                is_silent = True
                meeting.end()  # those who wait for the others report it now
            continue
        by_rank[one.rank] = one
    errors = {rank: one.error for rank, one in sorted(by_rank.items()) if one.error is not None}
    for rank, error in errors.items():
        if not isinstance(error, OthersEnded):
            error.add_note(f"on rank {rank} of {size}")
            raise error
    late = [rank for rank in range(size) if rank not in by_rank] or sorted(errors)
    if late:
        raise JobError(f"no word within {patience:g} s from the ranks {late} of {size}", BUG)
    return [by_rank[rank].result for rank in range(size)]
