"""A call in two halves: a seam copies first, and calls its block when the result is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import HOST
from lfm2kit.pending import Begins
from lfm2kit.seam import Seam, begun
from tests.conformance.late import LateMemory
from tests.core.test_model import Box, Elsewhere

X = np.arange(6, dtype=np.float32)


@pytest.fixture
def late() -> LateMemory:
    return LateMemory()


def doubling(events: list[str]) -> Any:
    def block(x: Any) -> Any:
        events.append("the block is called")
        return 2 * x

    return block


def test_what_is_enqueued_between_the_halves_runs_beside_the_block(late: LateMemory) -> None:
    """The block waits for its own inputs alone, and the memory's later work is done meanwhile."""
    events: list[str] = []
    seam = Seam(doubling(events), HOST, late, state_of=None)  # type: ignore[arg-type]
    pending = seam.begin(late.from_host(X))
    late.current.add(lambda: events.append("the memory works on"))
    assert (events, late.current.done) == ([], 0)
    result = pending.end()
    assert events == ["the block is called"]
    assert np.array_equal(late.to_host(result), 2 * X)
    assert events == ["the block is called", "the memory works on"]


def test_inputs_may_be_written_by_later_work(late: LateMemory) -> None:
    seam, x = Seam(doubling([]), HOST, late, state_of=None), late.from_host(X)  # type: ignore[arg-type]
    pending = seam.begin(x)
    late.current.add(lambda: x.make(np.full(6, np.nan)))
    assert np.array_equal(late.to_host(pending.end()), 2 * X)


@pytest.mark.parametrize("there", [HOST, Elsewhere()], ids=["ordered to host", "unordered"])
def test_both_halves_are_a_call(late: LateMemory, there: Any) -> None:
    def block(x: Any) -> Any:
        return Box(2 * x.values) if isinstance(x, Box) else 2 * x

    seam = Seam(block, there, late, state_of=None)  # type: ignore[arg-type]
    for result in (seam(late.from_host(X)), seam.begin(late.from_host(X)).end()):
        assert np.array_equal(late.to_host(result), 2 * X)
    assert isinstance(seam, Begins)


def test_a_wrapped_block_of_the_same_memory_and_a_plain_one_are_called_at_once() -> None:
    events: list[str] = []
    for block in (doubling(events), Seam(doubling(events), HOST, HOST, state_of=None)):  # type: ignore[arg-type]
        pending = begun(block, X)
        assert events.pop() == "the block is called"
        assert np.array_equal(pending.end(), 2 * X)
        assert not events


def test_a_crossing_that_can_begin_is_begun(late: LateMemory) -> None:
    class Crossing:
        server: Any = None

        def __call__(self, *inputs: Any) -> Any:
            return ("called", *inputs)

    class InHalves(Crossing):
        def begin(self, *inputs: Any) -> Any:
            return begun(lambda *xs: ("begun", *xs), *inputs)

    for crossing, how in ((Crossing(), "called"), (InHalves(), "begun")):
        seam = Seam(doubling([]), HOST, late, None, crossing)  # type: ignore[arg-type]
        assert seam.begin(1, 2).end() == (how, 1, 2)
