"""Rank 0 has the engine, and all ranks make its forwards: the same tokens as on one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.engine.steps import follow, packed, unpacked
from lfm2kit.progress import THIS_PROCESS
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.state import Room
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.core.small import build
from tests.engine.harness import PAGE_TOKENS, SPEC, Thirds, generated

ROOM = Room(4, PAGE_TOKENS)
REQUESTS = [
    Request([7] * 70, Sampling(seed=1), max_tokens=5),
    Request([1, 2, 3], Sampling(seed=2), max_tokens=9),
    Request([4] * 65, Sampling(temperature=0), max_tokens=3),
    Request([8, 9], Sampling(seed=3), max_tokens=6, constraint=Thirds()),
]


def shared_model(transport: ThreadTransport) -> Any:
    return build(SPEC, rewrites=[experts_over_ranks(transport.world, transport)])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_give_the_tokens_of_one_process(size: int) -> None:
    def rank(job: ThreadTransport) -> Any:
        model = shared_model(job)
        if job.world.rank:
            return follow(model, job, ROOM)
        with Engine(model, ROOM, budget=32, job=job) as engine:
            return generated(engine, *REQUESTS)

    with Engine(build(SPEC), ROOM, budget=32) as engine:
        apart = generated(engine, *REQUESTS)
    assert run_ranks(size, rank) == [apart] + [None] * (size - 1)


def test_all_ranks_have_the_smallest_room() -> None:
    def rank(job: ThreadTransport) -> Any:
        model, room = shared_model(job), Room(5 - job.world.rank)
        if job.world.rank:
            return follow(model, job, room)
        with Engine(model, room, job=job) as engine:
            return engine.room

    assert run_ranks(2, rank)[0] == Room(4)


class Broken:
    """A model whose forwards fail."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, batch: Any, state: Any, token_ids: Any = None) -> Any:
        raise OSError("no device")

    logits_at_home = logits


@pytest.mark.parametrize("broken", [0, 1])
def test_a_forward_that_fails_on_one_rank_ends_the_job(broken: int) -> None:
    def rank(job: ThreadTransport) -> Any:
        model = shared_model(job)
        if job.world.rank == broken:
            model = Broken(model)
        if job.world.rank:
            return follow(model, job, ROOM)
        with Engine(model, ROOM, job=job) as engine:
            return generated(engine, *REQUESTS)

    with pytest.raises(OSError, match="no device"):
        run_ranks(2, rank)


def test_the_first_rank_may_wait_for_requests_as_long_as_its_users() -> None:
    def rank(job: ThreadTransport) -> Any:
        model = shared_model(job)
        if job.world.rank:
            return follow(model, job, ROOM)
        with Engine(model, ROOM, job=job) as engine:
            before = THIS_PROCESS.now
            generated(engine, *REQUESTS)
            between = THIS_PROCESS.now
        return before, between, THIS_PROCESS.now

    before, between, after = run_ranks(2, rank)[0]
    assert before.name == between.name == "waiting for requests"
    assert between.seconds == 24 * 3600
    assert after.seconds == THIS_PROCESS.deadline


def test_a_batch_comes_back_from_what_is_sent() -> None:
    batch = Batch.of_sequences([[1, 2, 3], [4]], starts=[0, 70], pages=[[2], [0, 1]])
    again = unpacked(packed(batch))
    assert again.form == batch.form
    for name in ("token_ids", "positions", "cu_seqlens", "pages", "logits_rows"):
        assert np.array_equal(getattr(again, name), getattr(batch, name))
