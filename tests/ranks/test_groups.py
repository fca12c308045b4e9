"""Groups of ranks: where they are formed, what is refused, and the bits of one process in each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.cli.preparing import Request, prepare, settled
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HostMemory
from lfm2kit.ranks.agreement import least
from lfm2kit.ranks.groups import NO_GROUPS, NO_ROOM, Grouping, groupings
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import World
from tests.checkpoint.typed import Cli
from tests.random_model import RANDOM

SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], [2], [7, 7, 7]]
LAYOUTS = {
    "1 x 4": [0] * 4,
    "4 x 1": [0, 1, 2, 3],
    "2 x 2": [0, 0, 1, 1],
    "2 x 2, numbered by turns": [0, 1, 0, 1],
    "3 + 1": [0, 0, 1, 0],
    "4 x 4": [0, 1, 2, 3] * 4,
}


def chosen(nodes: list[int], parallel: str = "auto", ep_size: int | None = None) -> list[Any]:
    """Return the groups from which ranks on these machines choose."""
    return [g.groups for g in groupings(parallel, ep_size, World.of(0, nodes), None)]


def test_experts_stay_on_a_machine_where_they_fit_there() -> None:
    assert chosen(LAYOUTS["1 x 4"]) == [((0, 1, 2, 3),)]
    assert chosen(LAYOUTS["2 x 2"]) == [((0, 1), (2, 3)), ((0, 1, 2, 3),)]
    assert chosen(LAYOUTS["2 x 2, numbered by turns"]) == [((0, 2), (1, 3)), ((0, 1, 2, 3),)]
    assert chosen(LAYOUTS["3 + 1"]) == [((0, 1, 3), (2,)), ((0, 1, 2, 3),)]
    assert chosen(LAYOUTS["4 x 1"]) == [((0,), (1,), (2,), (3,)), ((0, 1, 2, 3),)]
    assert chosen(LAYOUTS["4 x 1"], "ep") == [((0, 1, 2, 3),)]
    assert chosen([0]) == chosen([0], "ep") == chosen([0], "dp") == [((0,),)]


def test_groups_of_a_given_size_are_on_as_few_machines_as_possible() -> None:
    turns = [0, 1, 2, 3] * 2
    assert chosen(turns, ep_size=2) == [((0, 4), (1, 5), (2, 6), (3, 7))]
    assert chosen(turns, ep_size=4) == [((0, 4, 1, 5), (2, 6, 3, 7))]
    assert chosen(turns, ep_size=8) == [(tuple(range(8)),)]
    alone = [tuple((rank,) for rank in range(8))]
    assert chosen(turns, ep_size=1) == chosen(turns, "dp") == alone
    unknown = groupings("auto", 2, World(0, 4, 0, 4), None)
    assert [one.groups for one in unknown] == [((0, 1), (2, 3))]


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    model = set_up(RANDOM, Options(backend="reference")).build()
    return [model.logits(Batch.of_sequences([one])) for one in SEQUENCES]


ASKED: dict[str, dict[str, Any]] = {
    "auto": {},
    "ep": {"parallel": "ep"},
    "dp": {"parallel": "dp"},
    "groups of 2": {"ep_size": 2},
    "groups of 4": {"ep_size": 4},
}


def layouts_and_groupings() -> Iterator[Any]:
    """Yield every pair; sixteen ranks take longest, and each time form the most groups alone."""
    for layout, asked in product(LAYOUTS, ASKED):
        is_long = layout == "4 x 4" and asked != "groups of 2"
        marks = [pytest.mark.long] * is_long
        yield pytest.param(layout, ASKED[asked], id=f"{asked}-{layout}", marks=marks)


@pytest.mark.parametrize(("layout", "asked"), list(layouts_and_groupings()))
def test_in_every_layout_and_grouping_a_rank_has_the_bits_of_one_process(
    layout: str, asked: dict[str, Any], alone: list[Any]
) -> None:
    nodes = LAYOUTS[layout]
    options = Options(backend="reference", **asked)

    def rank(transport: ThreadTransport) -> Any:
        mine = transport.world.rank % 5  # two ranks have more than one sequence, one of them none
        few = [i for i in range(len(SEQUENCES)) if i % 5 == mine and mine != 3]
        model = set_up(RANDOM, options, transport=transport).build()
        return few, model.logits(Batch.of_sequences([SEQUENCES[i] for i in few]))

    for few, logits in run_ranks(len(nodes), rank, nodes=nodes):
        assert len(logits) == len(few)
        for mine, there in zip(few, logits, strict=True):
            assert np.array_equal(there, alone[mine][0])


def test_a_group_sends_nothing_to_ranks_outside_it() -> None:
    calls: list[tuple[int, int]] = []

    class Counting(ThreadTransport):
        def all_to_all(self, rows: Any, send_counts: Any, *known: Any) -> Any:
            calls.append((self.world.size, len(send_counts)))
            return super().all_to_all(rows, send_counts, *known)

    def rank(transport: ThreadTransport) -> None:
        model = set_up(RANDOM, Options(backend="reference"), transport=transport).build()
        model.logits(Batch.of_sequences(SEQUENCES[:1]))

    run_ranks(4, rank, make=Counting, nodes=[0, 1, 0, 1])
    assert set(calls) == {(2, 2)}


class Plain(ThreadTransport):
    """A transport that forms no groups."""

    group = None  # type: ignore[assignment]


def test_a_transport_without_groups_has_experts_over_all_ranks_or_over_none() -> None:
    def rank(transport: ThreadTransport) -> list[Any]:
        options = [Options(backend="reference"), Options(backend="reference", parallel="dp")]
        setups = [set_up(RANDOM, one, transport=transport) for one in options]
        with pytest.raises(Lfm2kitError, match=f"ep_size=2: {NO_GROUPS}; try ep_size=4 or par"):
            set_up(RANDOM, Options(backend="reference", ep_size=2), transport=transport)
        return [(setup.grouping.groups, list(setup.notes())[-1:]) for setup in setups]

    for over_all, none in run_ranks(4, rank, make=Plain, nodes=[0, 0, 1, 1]):
        said = f"experts are shared out over all 4 ranks: {NO_GROUPS}"
        assert over_all == (((0, 1, 2, 3),), [said])
        assert none == (((0,), (1,), (2,), (3,)), [])


def test_where_one_machine_has_too_little_memory_all_ranks_share_the_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: 4_600_000)
    options = Options(backend="cpu_simd")
    world = World.of(0, [0, 1])
    setup = set_up(RANDOM, options, world=world)
    assert setup.grouping.groups == ((0, 1),)
    assert list(setup.notes())[-1] == f"experts are shared out over all 2 ranks: {NO_ROOM}"
    asked = set_up(RANDOM, Options(backend="cpu_simd", ep_size=1), world=world)
    assert asked.grouping.groups == ((0,), (1,))
    assert asked.shortage() is not None


def test_if_one_machine_has_too_little_memory_the_ranks_of_others_join_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def free_bytes(self: HostMemory, ranks: int = 1) -> int:
        return 4_600_000 if threading.current_thread().name == "rank 1" else 10**9

    monkeypatch.setattr(HostMemory, "free_bytes", free_bytes)
    request = Request(options=Options(backend="cpu_simd"), n=1)

    def rank(transport: ThreadTransport) -> Any:
        prepared = prepare(request, transport)
        before = prepared.setup.grouping.groups
        setup = settled(prepared, transport).setup
        assert list(setup.notes())[-1].endswith(NO_ROOM)
        return before, setup.grouping.groups

    alone, both = ((0,), (1,)), ((0, 1),)
    assert run_ranks(2, rank, nodes=[0, 1]) == [(alone, both), (both, both)]


def test_the_least_value_of_a_rank_is_known_to_all() -> None:
    assert run_ranks(3, lambda transport: least(transport, 5 - transport.world.rank)) == [3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "4", "--ep-size", "3"], ["4 ranks cannot form groups of 3; try --ep-size 2"]),
        (["--ranks", "4", "--ep-size", "9"], ["--ep-size 9: 4 ranks", "try --ep-size 4"]),
        (["--ranks", "4", "--ep-size", "0"], ["--ep-size 0: expected a whole number of 1 or more"]),
        (["--ranks", "4", "--ep-size", "two"], ["--ep-size two: expected a whole number"]),
        (["--ep-size", "2"], ["--ep-size 2: there is only one rank"]),
        (["--ranks", "4", "--parallel", "tp"], ["--parallel tp: expected ep, dp or auto"]),
        (
            ["--ranks", "2", "--parallel", "dp", "--ep-size", "2"],
            ["--parallel dp and --ep-size 2: give only one of them"],
        ),
        (["--ranks", "2", "--overlap", "yes"], ["--overlap yes: expected on, off or auto"]),
        (
            ["--overlap", "on"],
            ["--overlap on: there is only one rank; start more, or try --overlap auto"],
        ),
        (
            ["--ranks", "2", "--parallel", "dp", "--overlap", "on"],
            ["--overlap on: each rank holds all experts; try --parallel ep or --overlap auto"],
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_groups_that_cannot_be_are_one_line_before_anything_starts(
    cli: Cli, command: str, arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    written = ["--json", tmp_path / "record.json"]
    cli(command, "-b", "reference", *arguments, *written).assert_fails(*words)
    assert not list(tmp_path.iterdir())


def test_groups_say_how_large_they_are() -> None:
    assert str(Grouping(((0, 1), (2, 3)))) == "experts in groups of 2"
    assert str(Grouping(((0, 1, 3), (2,)))) == "experts in groups of 1 and 3"
    assert str(Grouping(((0,), (1,)))) == "each holds all experts"
