"""A model in a memory that works while the host goes on: in any stream, from any thread."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import HOST, Batch
from lfm2kit.memory import Exclusive, Ordered, own_stream
from lfm2kit.model import LFM2
from lfm2kit.replays import Replays
from lfm2kit.state import Room
from tests.conformance.late import LateBackend, LateMemory
from tests.core.small import build, small_spec
from tests.core.test_model import SEQUENCES, Recorded

TURNS = 50


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads interrupt each other all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class SlowReplay(Recorded):
    """A replay that gives other threads time to close it before it begins."""

    def __call__(self, batch: Batch) -> Any:
        time.sleep(0.001)
        return super().__call__(batch)


class CapturingLate(LateBackend):
    def capture(self, forward: Any, batch: Batch) -> Recorded:
        return SlowReplay(lambda host: forward(host.on(self.late)), 8, [0])


def model(backend: LateBackend) -> LFM2:
    return build(small_spec(), "late", {"late": backend})


def test_a_memory_shows_its_capabilities() -> None:
    assert isinstance(LateMemory(), Ordered)
    assert not isinstance(HOST, Ordered)
    assert not isinstance(HOST, Exclusive)


def test_an_own_stream_goes_on_where_the_current_one_is() -> None:
    memory, array = LateMemory(), np.arange(3)
    before = memory.from_host(array)
    with memory.stream(), pytest.raises(RuntimeError, match="before it is made"):
        memory.to_host(before)
    with own_stream(memory):
        assert np.array_equal(memory.to_host(before), array)
    with own_stream(HOST):
        assert HOST.to_host(array) is array


def test_an_own_stream_has_ended_its_work_when_it_is_interrupted() -> None:
    memory, made = LateMemory(), []

    def interrupted() -> None:
        with own_stream(memory):
            made.append(memory.from_host(np.arange(3)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert made[0].values.tolist() == [0, 1, 2]


def test_a_forward_leaves_the_callers_stream_alone() -> None:
    backend = LateBackend()
    before = backend.late.current
    model(backend).logits(Batch.of_sequences(SEQUENCES))
    assert backend.late.current is before
    assert all("LateBlock" not in repr(work) for work in before.work)


def test_a_forward_comes_after_one_that_was_left_before_it_was_over() -> None:
    """In whatever streams they are."""
    late, plain = model(LateBackend()), build(small_spec())
    states = [one.new_state(Room(1, 64)) for one in (late, plain)]
    prompt = Batch.of_sequences([[1, 2, 3]], pages=[[0]])
    with late.logits_at_home(prompt, states[0]):
        pass
    plain.logits(prompt, states[1])
    step = Batch.of_sequences([[4]], starts=[3], pages=[[0]])
    assert np.array_equal(late.logits(step, states[0]), plain.logits(step, states[1]))


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("kind", [LateBackend, CapturingLate])
def test_two_threads_share_a_memory(
    kind: type[LateBackend], models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one model or two, and also where every call drops the other thread's replay."""
    replays = Replays(LateMemory(), most=1)
    monkeypatch.setattr("lfm2kit.model.replays_in", lambda memory: replays)
    backend = kind()
    shared = [model(backend) for _ in range(models)]

    def logits(sequence: list[int]) -> list[Any]:
        one = shared[len(sequence) % models]
        return [one.logits(Batch.of_sequences([sequence])) for _ in range(TURNS)]

    want = build(small_spec()).logits(Batch.of_sequences(SEQUENCES))
    with ThreadPoolExecutor(2) as threads:
        for row, got in zip((0, 2), threads.map(logits, (SEQUENCES[0], SEQUENCES[2])), strict=True):
            assert all(np.array_equal(one, want[row : row + 1]) for one in got)


@pytest.mark.usefixtures("hasty_threads")
def test_two_threads_run_a_batch_of_both() -> None:
    shared, batch = model(LateBackend()), Batch.of_sequences(SEQUENCES)
    want = build(small_spec()).logits(batch)
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(lambda _: shared.logits(batch).copy(), range(TURNS)))
    assert all(np.array_equal(one, want) for one in got)


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("kind", [LateBackend, CapturingLate])
def test_two_threads_decode_sequences_of_one_state(kind: type[LateBackend]) -> None:
    shared = model(kind())
    state = shared.new_state(Room(2, 64))

    def decode(page: int) -> Any:
        steps = [
            Batch.of_sequences([[token]], starts=[start], pages=[[page]])
            for start, token in enumerate(SEQUENCES[2 * page])
        ]
        return [shared.logits(step, state) for step in steps][-1]

    want = build(small_spec()).logits(Batch.of_sequences(SEQUENCES))
    with ThreadPoolExecutor(2) as threads:
        for page, got in enumerate(threads.map(decode, (0, 1))):
            np.testing.assert_allclose(got, want[2 * page : 2 * page + 1], atol=1e-6)


@pytest.mark.usefixtures("hasty_threads")
def test_two_threads_make_states_of_one_model_and_let_them_go() -> None:
    shared, batch = model(CapturingLate()), Batch.of_sequences([[1]], pages=[[0]])
    want = build(small_spec()).logits(Batch.of_sequences([[1]]))

    def run(_: int) -> Any:
        state = shared.new_state(Room(1, 64))
        return [shared.logits(batch, state) for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        for got in threads.map(run, range(TURNS // 5)):
            assert all(np.array_equal(one, want) for one in got)
