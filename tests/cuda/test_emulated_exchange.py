"""The exchange's kernels on the CPU: ranks are processes, whose CUDA threads take turns.

Stores into a peer's memory become visible late and in any order, unless a flag is raised after
them, and all ranks pause now and then.  So a flag that is raised too early, and a place that is
used again too early, leave wrong numbers: three such faults are planted here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.constants import EXCHANGE
from lfm2kit_cuda.exchange_size import Size

from lfm2kit.formats import BF16, F16, F32, Format, rounded
from lfm2kit.transport import Owners, evenly, held_once
from tests.cuda.emulated_operators import compiled

MARGIN, POISON = 16, np.frombuffer(b"\xa5" * 4, np.int32)[0]  # as in emulated/exchange.cpp
K, WIDTH = 3, 19  # more than two lanes ask for at once
LANES = 2
LATE, GAVE_UP = 0, 1
DEADLINE, SOON = 200.0, 3.0  # seconds

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program_of(tmp_path_factory.mktemp("exchange"))


class Narrow(NamedTuple):
    """Kernels for experts that read rows of 16 bits."""

    program: Path
    row_format: Format


@pytest.fixture(scope="module", params=[BF16, F16], ids=str)
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Narrow:
    folder = tmp_path_factory.mktemp(str(request.param))
    return Narrow(program_of(folder, row_format=request.param), request.param)


def program_of(
    folder: Path, fault: tuple[str, str] | None = None, row_format: Format = F32
) -> Path:
    """Return the compiled kernels for experts that read rows in a format."""
    return compiled(folder, "exchange", fault, VECTOR=1, TAKEN=K, LANES=LANES, ROW=row_format.name)


@dataclass
class Given:
    """A rank's tokens in one call."""

    x: Floats
    ids: Int32
    weights: Floats


@dataclass
class Left:
    """What a call leaves on a rank, all as words."""

    x: Any  # as experts read it
    ids: Int32
    weights: Int32
    delta: Int32


@dataclass
class Rank:
    """What a rank has done."""

    cause: int
    call: int
    statistics: list[int]
    calls: list[Left]


def tokens_of(rng: np.random.Generator, tokens: int, experts: int) -> Given:
    """Return tokens that choose any experts; some choose one less, some none."""
    ids = rng.random((tokens, experts)).argsort(axis=1)[:, :K].astype(np.int32)
    weights = (rng.random((tokens, K)) * 10.0 ** rng.integers(-3, 4, (tokens, K))).astype(
        np.float32
    )
    nobodys = rng.random((tokens, K)) < 0.15
    nobodys[2::5] = True
    ids[nobodys], weights[nobodys] = -1, np.nan
    return Given(rng.standard_normal((tokens, WIDTH), np.float32), ids, weights)


def ran(
    program: Path,
    owners: Owners,
    given: Sequence[Sequence[Given]],
    *,
    most: int,
    slots: int | None = None,
    ctas: int = 3,
    threads: int = 4,
    deadline: float = DEADLINE,
    first: int = 0,
    absent: int = -1,
    late: int = -1,
    giving_up: int = -1,
    element: int | None = None,
    row_format: Format = F32,
    seed: int = 1,
) -> list[Rank]:
    """Return what ranks with these tokens, by call and rank, leave behind."""
    ranks, experts, calls = len(owners), len(owners[0]), len(given)
    slots = most if slots is None else slots
    element = row_format.block_bytes if element is None else element
    numbers = [
        ranks, most, slots, K, WIDTH, experts, calls, ctas, threads, deadline, first, absent, late,
        giving_up, element, seed,
    ]  # fmt: skip
    arrays: list[Any] = [np.array(owners, np.int32)]
    for of_call in given:
        for mine in of_call:
            arrays.append(np.array([len(mine.x)], np.int32))
            arrays += [_filled_up(array, most) for array in (mine.x, mine.ids, mine.weights)]
    done = subprocess.run(
        [str(program), *map(str, numbers)], input=b"".join(a.tobytes() for a in arrays),
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    (mailbox_bytes,) = np.frombuffer(done.stdout, np.uint64, 1)
    assert mailbox_bytes == Size(most, K + 1, WIDTH + 2, element).nbytes(ranks)
    rows = slots * K * ranks
    return [*_read(done.stdout[8:], ranks, rows, most, experts, calls, row_format)]


def _filled_up(array: Any, most: int) -> Any:
    rest = np.full((most - len(array), *array.shape[1:]), 1, array.dtype)
    return np.concatenate([array, rest])


def _read(
    out: bytes, ranks: int, rows: int, most: int, experts: int, calls: int, row_format: Format
) -> Any:
    row_words = -(-row_format.nbytes((rows * WIDTH,)) // 4)
    sizes = [row_words, rows, rows, most * WIDTH]
    counts = EXCHANGE.STATISTICS + experts
    left = np.frombuffer(out, np.int32)
    for _ in range(ranks):
        (cause, call), statistics, left = np.split(left, [2, 2 + 2 * counts])
        of_calls = []
        for _ in range(calls):
            parts = []
            for size in sizes:
                part, margin, left = np.split(left, [size, size + MARGIN])
                assert (margin == POISON).all()
                parts.append(part)
            parts[0] = parts[0].view(row_format.block)[: rows * WIDTH].view(_bits(row_format))
            of_calls.append(Left(*parts))
        yield Rank(int(cause), int(call), statistics.copy().view(np.int64).tolist(), of_calls)
    assert not len(left)


def _bits(row_format: Format) -> Any:
    """Return the type of the bits of an element, by which NaN is compared too."""
    return f"u{row_format.block_bytes}"


def expected(
    owners: Owners,
    given: Sequence[Given],
    rank: int,
    most: int,
    slots: int,
    row_format: Format = F32,
) -> Left:
    """Return what a call must leave on a rank; what it does not write stays poisoned."""
    rows, bits = len(owners) * slots * K, _bits(row_format)
    x = np.full((rows, WIDTH), POISON, np.int32).view(bits)[:, :WIDTH].copy()
    ids, weights = np.full(rows, -1, np.int32), np.zeros(rows, np.float32)
    for source, its in enumerate(given):
        for t, j in zip(*np.nonzero(its.ids >= 0), strict=True):
            if owners[source][its.ids[t, j]] == rank:
                row = (source * slots + t) * K + j
                x[row], ids[row] = rounded(its.x[t], row_format).view(bits), its.ids[t, j]
                weights[row] = its.weights[t, j]
    mine = given[rank]
    delta = np.full((most, WIDTH), POISON, np.int32)
    for t, row_ids in enumerate(mine.ids):
        sums = np.zeros(WIDTH, np.float32)
        taken = np.flatnonzero(row_ids >= 0)
        for n, j in enumerate(taken):
            read = row_format.unpack(rounded(mine.x[t], row_format))
            scaled = read * np.float32(1 + np.float32(row_ids[j]) / 8)
            product = mine.weights[t, j] * scaled
            sums = product if n == 0 else sums + product
        delta[t] = sums.astype(np.float32).view(np.int32)
    return Left(x.ravel(), ids, weights.view(np.int32), delta.ravel())


def assert_right(
    ranks: Sequence[Rank],
    owners: Owners,
    given: Sequence[Sequence[Given]],
    most: int,
    slots: int | None = None,
    row_format: Format = F32,
) -> None:
    for number, rank in enumerate(ranks):
        assert rank.cause == 0
        for left, of_call in zip(rank.calls, given, strict=True):
            want = expected(owners, of_call, number, most, slots or most, row_format)
            for name in ("ids", "weights", "x", "delta"):
                np.testing.assert_array_equal(getattr(left, name), getattr(want, name), name)


def ragged(ranks: int, experts: int, most: int, calls: int, seed: int = 0) -> list[list[Given]]:
    """Return tokens by call and rank: some ranks have none, some as many as there may be."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, most - 1, most], (calls, ranks))
    return [[tokens_of(rng, int(count), experts) for count in of_call] for of_call in counts]


def replicated(ranks: int, experts: int) -> Owners:
    """Return owners of experts of which every rank has the even ones, and one rank the others."""
    return tuple(
        tuple(rank if e % 2 == 0 else (7 * e + 3) % ranks for e in range(experts))
        for rank in range(ranks)
    )


@pytest.mark.parametrize(
    ("owners", "most", "slots", "calls"),
    [
        (held_once(evenly(2, 12), 2), 5, 5, 40),
        (held_once(evenly(2, 33), 2), 9, 6, 8),  # a smaller forward than the largest
        (held_once(evenly(3, 12), 3), 4, 4, 12),
        (held_once([0, 0, 0, 2, 2], 3), 3, 3, 8),  # one rank has none
        (replicated(4, 12), 3, 3, 8),
    ],
)
def test_rows_and_sums_are_right_in_every_call(
    exchange: Path, owners: Owners, most: int, slots: int, calls: int
) -> None:
    given = ragged(len(owners), len(owners[0]), slots, calls)
    assert_right(ran(exchange, owners, given, most=most, slots=slots), owners, given, most, slots)


@pytest.mark.parametrize(("ctas", "threads"), [(1, 4), (2, 16), (9, 4)])
def test_the_grid_changes_nothing(exchange: Path, ctas: int, threads: int) -> None:
    owners = replicated(2, 12)
    given = ragged(2, 12, 4, 3)
    assert_right(ran(exchange, owners, given, most=4, ctas=ctas, threads=threads), owners, given, 4)


def test_eight_ranks_without_a_token_do_no_harm(exchange: Path) -> None:
    owners, rng = held_once(evenly(8, 12), 8), np.random.default_rng(0)
    given = [[tokens_of(rng, int(r == call), 12) for r in range(8)] for call in (0, 9, 7)]
    assert_right(ran(exchange, owners, given, most=2, ctas=1, threads=8), owners, given, 2)


# Ties of BF16 and F16, also below the least normal number, and what they cannot hold.
EDGES = np.array(
    [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, -1.5 * 2**-24, 7e4, -65519,
     3.4e38, -np.inf, -0.0, 1e-40, 2**-14 - 2**-26, 65504],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("element", [2, 4])
def test_rows_of_16_bits_are_rounded_before_they_travel(narrow: Narrow, element: int) -> None:
    """Mailboxes may have room for another layer's float32."""
    (program, row_format), owners, most = narrow, replicated(3, 12), 5
    given = ragged(3, 12, most, 4)
    for of_call in given:
        for mine in of_call:
            mine.x[::2] = np.resize(EDGES, mine.x[::2].shape)
            mine.weights[::2] = np.abs(mine.weights[::2])
    with np.errstate(over="ignore", under="ignore"):
        left = ran(program, owners, given, most=most, element=element, row_format=row_format)
        assert_right(left, owners, given, most, row_format=row_format)


def test_numbers_of_calls_begin_again_and_leave_out_the_mark_of_failure(exchange: Path) -> None:
    owners = held_once(evenly(2, 12), 2)
    given = ragged(2, 12, 3, 6)
    ranks = ran(exchange, owners, given, most=3, first=2**32 - 4)
    assert_right(ranks, owners, given, 3)
    assert [rank.call for rank in ranks] == [3] * 2  # 2^32 - 3, 2^32 - 2, and then 0 to 3


def test_what_is_counted_follows_from_the_routing(exchange: Path) -> None:
    owners = replicated(3, 12)
    given = ragged(3, 12, 4, 5)
    for number, rank in enumerate(ran(exchange, owners, given, most=4)):
        calls, tokens, rows_sent, products_sent, *seconds = rank.statistics[: EXCHANGE.STATISTICS]
        of_rank = [of_call[number] for of_call in given]
        assert (calls, tokens) == (5, sum(len(mine.x) for mine in of_rank))
        tokens_ids = [ids for mine in of_rank for ids in mine.ids]
        to = [{owners[number][e] for e in ids if e >= 0} - {number} for ids in tokens_ids]
        assert rows_sent == sum(map(len, to))
        came = np.concatenate([left.ids for left in rank.calls])
        by_expert = np.bincount(came[came >= 0], minlength=12)
        assert rank.statistics[EXCHANGE.STATISTICS :] == by_expert.tolist()
        own = sum(owners[number][e] == number for ids in tokens_ids for e in ids if e >= 0)
        assert products_sent == by_expert.sum() - own
        assert all(0 < ns < 1e9 * DEADLINE for ns in seconds)


@pytest.mark.parametrize(("ranks", "since"), [(2, 1), (3, 0)])
def test_a_rank_that_does_not_come_is_named_by_all_others(
    exchange: Path, ranks: int, since: int
) -> None:
    """All calls before are right; later ones end at once, with rows of nobody and sums of NaN."""
    owners = held_once(evenly(ranks, 12), ranks)
    given = [[tokens_of(np.random.default_rng(r), 3, 12) for r in range(ranks)]] * 4
    left = ran(exchange, owners, given, most=3, deadline=SOON, absent=since * ranks + ranks - 1)
    for number, rank in enumerate(left[:-1]):
        assert rank.cause == since << 8 | (1 + 2 * (ranks - 1) + LATE)
        for call, of_call in enumerate(rank.calls):
            want = expected(owners, given[call], number, 3, 3)
            if call < since:
                np.testing.assert_array_equal(of_call.delta, want.delta)
                continue
            assert np.isnan(of_call.delta.view(np.float32)).all()
            assert call == since or (of_call.ids == -1).all()


def test_a_host_that_gives_up_ends_the_wait_and_all_ranks_know(exchange: Path) -> None:
    """The other rank may then still be adding the products of the call before: its sums are right,
    or NaN."""
    owners = held_once(evenly(2, 12), 2)
    given = [[tokens_of(np.random.default_rng(r), 3, 12) for r in range(2)]] * 3
    left = ran(exchange, owners, given, most=3, late=0, giving_up=2 * 1 + 1)
    assert [rank.cause for rank in left] == [1 << 8 | (1 + 2 * 1 + GAVE_UP)] * 2
    before = [rank.calls[0].delta for rank in left]
    wanted = [expected(owners, given[0], number, 3, 3).delta for number in range(2)]
    np.testing.assert_array_equal(before[1], wanted[1])
    ended = np.isnan(before[0].view(np.float32))
    np.testing.assert_array_equal(before[0][~ended], wanted[0][~ended])
    assert np.isnan(left[1].calls[1].delta.view(np.float32)).all()
    for rank in left:
        assert np.isnan(rank.calls[2].delta.view(np.float32)).all()


FAULTS = {  # what is there, and what is put in its place
    "a flag that does not wait for the data": (
        "raise_flag(&line->flag",
        "store_relaxed(&line->flag",
    ),
    "a flag of the first CTA, not of the last": (
        "if (!is_last) return;",
        "if (blockIdx.x || blockIdx.y) return;",
    ),
    "a place that is used again too early": (
        "have_come(box.returned(0), 0, ranks,",
        "have_come(box.returned(0), 0, tokens ? ranks : 0,",
    ),
}


def with_a_late_rank(program: Path, deadline: float) -> None:
    """Rank 2 has nothing for the others in every second call, and rank 0 takes its rows late."""
    owners, rng = held_once(evenly(3, 12), 3), np.random.default_rng(0)
    given = [[tokens_of(rng, n, 12) for n in (4, 3, 4 * (call % 2))] for call in range(6)]
    assert_right(
        ran(program, owners, given, most=4, late=0, deadline=deadline, ctas=2), owners, given, 4
    )


def test_a_rank_that_takes_its_rows_late_finds_them(exchange: Path) -> None:
    with_a_late_rank(exchange, DEADLINE)


ALWAYS, *OTHERS = FAULTS


@pytest.mark.parametrize(
    "fault", [ALWAYS, *(pytest.param(fault, marks=pytest.mark.long) for fault in OTHERS)]
)
def test_a_fault_shows(fault: str, tmp_path: Path) -> None:
    program = program_of(tmp_path, FAULTS[fault])
    with pytest.raises(AssertionError):
        with_a_late_rank(program, SOON)
