"""Steps: who tells them, in which order, and how long each may take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit import progress
from lfm2kit.backend import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.measuring.running import run_samples
from lfm2kit.progress import DEADLINE, Progress
from lfm2kit.specs import Work
from lfm2kit.transport import World
from tests.random_model import RANDOM


class Alone:
    """A transport of one rank."""

    world = World()

    def all_to_all(self, rows: Any, send_counts: Any, *known: Any) -> tuple[Any, list[int]]:
        return rows, list(send_counts)

    def gather(self, rows: Any, counts: Any = None) -> Any:
        return rows

    def barrier(self) -> None:
        pass


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[progress.Step]:
    """Return the steps that this process tells from now on."""
    told: list[progress.Step] = []
    mine = Progress()
    mine.on_step = lambda: told.append(mine.now)
    monkeypatch.setattr(progress, "THIS_PROCESS", mine)
    return told


def test_a_step_may_take_the_deadline_or_longer_where_it_says_so(
    steps: list[progress.Step],
) -> None:
    progress.set_deadline(2)
    progress.allow({"attention": 30})
    for name, seconds in [("norm", 0), ("attention", 0), ("attention", 40), ("compiling", 600)]:
        progress.step(name, seconds)
    assert [(step.name, step.seconds) for step in steps] == [
        ("norm", 2), ("attention", 30), ("attention", 40), ("compiling", 600)
    ]  # fmt: skip
    assert [step.number for step in steps] == [1, 2, 3, 4]


def test_work_takes_longest_where_both_computing_and_reading_are_slow() -> None:
    assert progress.longest(Work(flops=3e9, bytes=2e7)) == 3 + 2


def test_a_rank_tells_each_block_that_it_builds_and_each_that_it_computes(
    steps: list[progress.Step],
) -> None:
    setup = set_up(RANDOM, Options(backend="reference"), transport=Alone())  # type: ignore[arg-type]
    model = setup.build()
    leaves = [leaf.name for leaf in setup.placed.leaves()]
    assert [step.name for step in steps] == [f"building {name}" for name in leaves]
    del steps[:]
    run_samples(model, np.zeros((3, 4), np.int32), 2, transport=Alone())  # type: ignore[arg-type]
    assert [step.name for step in steps] == 2 * leaves
    assert all(step.seconds == DEADLINE for step in steps)  # a small batch asks for no more


def test_a_long_batch_gives_the_blocks_that_need_it_more_time(
    steps: list[progress.Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SLOWEST_FLOPS", 1e5)
    setup = set_up(RANDOM, Options(backend="reference"), transport=Alone())  # type: ignore[arg-type]
    run_samples(setup.build(), np.zeros((8, 16), np.int32), 8, transport=Alone())  # type: ignore[arg-type]
    longest = {step.name: step.seconds for step in steps}
    assert longest["layers.0.feed_forward"] > DEADLINE
    assert longest["layers.0.operator_norm"] == DEADLINE


def test_one_process_alone_pays_nothing_for_steps(steps: list[progress.Step]) -> None:
    model = set_up(RANDOM, Options(backend="reference")).build()
    del steps[:]
    model.logits(Batch.of_sequences([[1, 2]]))
    assert steps == []
