"""Jobs of several numbers of ranks: in which order they run, and what is made of their records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lfm2kit.measuring.scaling import Job, Parts, Scaled, measure, parts_of, speed_up


def record(seconds: float, ranks: int = 1, **more: Any) -> dict[str, Any]:
    groups = [list(range(ranks))]
    figures = [{"name": "time", "unit": "s", "better": "lower", "values": [seconds]}]
    return {"figures": figures, "ranks": ranks, "groups": groups, "finite": True, **more}


def exchanged(layers: int, seconds: Sequence[float], waited: Sequence[float]) -> dict[str, Any]:
    """Return the counts of a run that spent these seconds in each operation, by rank."""
    operation = {"seconds": list(seconds)}
    layer = {"counts": operation, "dispatch": operation, "combine": operation}
    return {"layers": [layer] * layers, "gather": operation, "waited_seconds": list(waited)}


def test_jobs_run_interleaved() -> None:
    jobs = [Job("reference", ranks, 8) for ranks in (1, 2, 4)]
    seconds = iter([4.0, 3.0, 2.0, 40.0, 3.2, 2.0, 5.0, 3.1, 2.0])
    order: list[int] = []

    def run(job: Job) -> dict[str, Any]:
        order.append(job.ranks)
        return record(next(seconds), job.ranks)

    measured = measure(jobs, 3, run)
    assert order == [1, 2, 4] * 3
    assert [one.median for one in measured] == [5.0, 3.1, 2.0]
    assert measured[2].spread == 0.0
    assert [speed_up(one, measured) for one in measured] == [1.0, 5.0 / 3.1, 2.5]


def test_the_speed_up_is_over_the_fewest_ranks_that_do_the_same() -> None:
    one, two = Scaled(Job("a", 4, 8), [record(1.0)]), Scaled(Job("a", 2, 8), [record(3.0)])
    others = [Scaled(Job("b", 1, 8), [record(9.0)]), Scaled(Job("a", 1, 16), [record(9.0)])]
    assert speed_up(one, [one, two, *others]) == 3.0


def test_a_process_alone_only_computes() -> None:
    assert parts_of(record(2.0)) == Parts(2.0, 0.0, 0.0)


def test_what_a_rank_waits_is_not_counted_as_exchange() -> None:
    run = record(8.0, 2, exchanged=exchanged(2, [0.25, 0.75], [0.0, 2.0]))
    # Seven operations of 0.5 s on average, of which 1 s is waiting.
    assert parts_of(run) == Parts(4.5, 2.5, 1.0)


def test_ranks_that_hold_all_experts_exchange_logits_alone() -> None:
    run = record(8.0, 2, exchanged=exchanged(0, [0.25, 0.75], [0.0, 0.0]))
    assert parts_of(run | {"groups": [[0], [1]]}) == Parts(7.5, 0.5, 0.0)


@pytest.mark.parametrize("more", [{}, {"exchanged": exchanged(0, [0.25, 0.75], [0.0, 0.0])}])
def test_an_exchange_that_does_not_count_leaves_the_parts_unknown(more: dict[str, Any]) -> None:
    run = record(8.0, 2, **more)
    assert parts_of(run) is None
    assert Scaled(Job("a", 2, 8), [run]).parts is None
