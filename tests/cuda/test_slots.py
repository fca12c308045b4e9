"""Portions pass through slots in order, in plain calls and in graphs, on a CuPy that works late.

The stream that copies works as late as it may, or as early.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import Batch
from tests.cuda import late_cupy
from tests.cuda.late_cupy import current_stream, empty

BYTES = 8
BATCH = Batch.of_sequences([[1, 2, 3]])


class Forward:
    """Reads every portion once, in their order, and gives what it has read as its result."""

    def __init__(self, module: Any, count: int, sizes: list[int]) -> None:
        self.slots = module.Slots(count, BYTES)
        self.portions = [np.arange(n, n + size, dtype=np.uint8) for n, size in enumerate(sizes)]
        self.numbers = [self.slots.add(portion) for portion in self.portions]
        self.fails_after = len(sizes)

    def __call__(self, batch: Any = None) -> Any:
        return self.first(len(self.numbers))

    def first(self, count: int) -> Any:
        """Read the first portions alone, as a block does that is called by itself."""
        read = empty((len(self.portions), BYTES), np.uint8)
        for number in self.numbers[:count]:
            if number == self.fails_after:
                raise RuntimeError("a forward fails")
            with self.slots.holding(number):
                self._read(number, read)
        return read

    def _read(self, number: int, read: Any) -> None:
        slot = self.slots.slot_of(number)
        current_stream().add(lambda: np.copyto(read.values[number], slot.values))

    @property
    def expected(self) -> Any:
        return [portion.tolist() for portion in self.portions]


class Scene:
    """A memory of the device, and forwards whose slots are filled late or early."""

    def __init__(self, *, is_hasty: bool, slots: Any, capture: Any, memory: Any) -> None:
        self.module, self.capture = slots, capture
        self.memory, self.is_hasty = memory.memory_of(1), is_hasty

    def forward(self, count: int = 2, sizes: list[int] | None = None) -> Forward:
        with self.memory.stream():
            forward = Forward(self.module, count, sizes or [BYTES] * 7)
        forward.slots._link.stream.is_hasty = self.is_hasty
        return forward

    def replay(self, forward: Forward) -> Callable[[Batch], Any]:
        replay: Callable[[Batch], Any] = self.capture.Replay(forward, BATCH, self.memory)
        return replay

    def read(self, call: Callable[[Batch], Any], forward: Forward) -> Any:
        """Return each portion as the call has read it, in a stream of its own."""
        with self.memory.stream():
            read = self.memory.to_host(call(BATCH))
        return [row[: len(p)].tolist() for row, p in zip(read, forward.portions, strict=True)]


@pytest.fixture(params=[False, True], ids=["late", "early"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with late_cupy.loaded("slots", "capture", "memory") as (slots, capture, memory):
        yield Scene(is_hasty=request.param, slots=slots, capture=capture, memory=memory)


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_every_portion_is_read_as_it_is(scene: Scene, count: int) -> None:
    forward = scene.forward(count)
    for _ in range(3):
        assert scene.read(forward, forward) == forward.expected


def test_portions_may_be_of_different_sizes(scene: Scene) -> None:
    forward = scene.forward(3, [3, 8, 1, 5, 8, 2])
    for _ in range(2):
        assert scene.read(forward, forward) == forward.expected


def test_a_graph_fills_the_slots_in_every_replay(scene: Scene) -> None:
    forward = scene.forward(3)
    replay = scene.replay(forward)
    for _ in range(3):
        assert scene.read(replay, forward) == forward.expected


def test_graphs_and_plain_calls_do_not_disturb_each_other(scene: Scene) -> None:
    forward = scene.forward()
    calls = [forward, scene.replay(forward), scene.replay(forward)]
    for i in (0, 1, 0, 2, 1, 1, 0, 0, 2):
        assert scene.read(calls[i], forward) == forward.expected


def test_calls_that_have_not_begun_keep_their_order(scene: Scene) -> None:
    """Each is in a stream of its own.  Nobody waits between them, and for the last one first."""
    forward = scene.forward()
    replays = [scene.replay(forward), scene.replay(forward)]
    reads = []
    with ExitStack() as streams:
        for i, count in enumerate((7, None, 4, None, None, 3)):
            streams.enter_context(scene.memory.stream())
            read = replays[i % 2](BATCH) if count is None else forward.first(count)
            reads.append((scene.memory.start_to_host(read), count))
    for arriving, count in reversed(reads):
        assert arriving.wait().tolist()[:count] == forward.expected[:count]


@pytest.mark.parametrize("fails_after", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("then", ["plain", "graph"])
def test_after_a_forward_that_failed_the_next_one_is_right(
    scene: Scene, fails_after: int, then: str
) -> None:
    """What it has fetched and nobody has read is still on its way, or there."""
    forward = scene.forward(3)
    replay = scene.replay(forward)
    for call in {"plain": (forward, replay, forward), "graph": (replay, forward)}[then]:
        forward.fails_after = fails_after
        with pytest.raises(RuntimeError, match="a forward fails"), scene.memory.stream():
            forward()
        forward.fails_after = len(forward.portions)
        assert scene.read(call, forward) == forward.expected


def test_a_capture_that_fails_leaves_the_slots_usable(scene: Scene) -> None:
    forward = scene.forward()
    forward.fails_after = 3
    with pytest.raises(RuntimeError, match="a forward fails"):
        scene.replay(forward)
    forward.fails_after = len(forward.portions)
    for call in (forward, scene.replay(forward), forward):
        assert scene.read(call, forward) == forward.expected


def test_copies_run_ahead_of_the_layers_and_no_further_than_there_are_slots(scene: Scene) -> None:
    forward, sent = scene.forward(3), []
    fetch = scene.module._Passage.fetch

    def noting(passage: Any, number: int) -> None:
        held = list(passage._held)
        fetch(passage, number)
        if passage._held != held:
            sent.append(number)

    scene.module._Passage.fetch = noting
    with scene.memory.stream():
        for number in forward.numbers:
            with forward.slots.holding(number):
                assert sent == list(range(min(number + 3, 7)))


def test_two_models_have_slots_of_their_own(scene: Scene) -> None:
    forwards = [scene.forward(), scene.forward(2, [5] * 4)]
    replays = [scene.replay(forward) for forward in forwards]
    for i in (0, 1, 1, 0):
        assert scene.read(forwards[i], forwards[i]) == forwards[i].expected
        assert scene.read(replays[i], forwards[i]) == forwards[i].expected


def test_slots_are_given_back_when_their_last_copy_has_ended(scene: Scene) -> None:
    """A forward that failed has left one under way."""
    forward = scene.forward(3)
    forward.fails_after = 4
    with scene.memory.stream(), pytest.raises(RuntimeError, match="a forward fails"):
        forward()
    stream = forward.slots._link.stream
    assert scene.is_hasty or stream.done < len(stream.work)
    gone = weakref.ref(forward.slots)
    del forward
    gc.collect()  # the exception's traceback
    assert gone() is None
    assert stream.done == len(stream.work)


# Faults, each of which the scenes above show: in plain calls or in graphs, late or early.


def reused_too_early(module: Any) -> None:
    fetch = module._Passage.fetch

    def hasty(passage: Any, number: int) -> None:
        passage._read = [None] * len(passage._held)
        fetch(passage, number)

    module._Passage.fetch = hasty


def read_before_it_arrives(module: Any) -> None:
    module._Passage.await_arrival = lambda *arguments: None


def of_the_layer_before(module: Any) -> None:
    fetch = module._Passage.fetch
    module._Passage.fetch = lambda passage, number: fetch(passage, max(number - 1, 0))


def released_before_it_is_read(module: Any) -> None:
    def enqueue_late(slots: Any, number: int) -> Any:
        with slots._lock:
            passage, stream = slots._passage(), current_stream()
            for one in range(number, min(number + len(slots), len(slots._link.portions))):
                passage.fetch(one)
            passage.await_arrival(number, stream)
            passage.release(number, stream)
        return nullcontext()

    module.Slots.holding = enqueue_late


def remembered_through_a_graph(module: Any) -> None:
    module._Passage.release_all = lambda *arguments: None


def launched_beside_plain_calls(module: Any) -> None:
    await_all = module._Passage.await_all
    module._Passage.await_all = lambda passage, stream: (
        await_all(passage, stream) if stream.recorded is not None else None
    )


SCENES = (
    test_every_portion_is_read_as_it_is,
    test_a_graph_fills_the_slots_in_every_replay,
    test_calls_that_have_not_begun_keep_their_order,
    test_after_a_forward_that_failed_the_next_one_is_right,
)


@pytest.mark.parametrize(
    "fault",
    [
        reused_too_early,
        read_before_it_arrives,
        of_the_layer_before,
        released_before_it_is_read,
        remembered_through_a_graph,
        launched_beside_plain_calls,
    ],
)
def test_a_planted_fault_shows(fault: Callable[[Any], None]) -> None:
    assert any(shows(fault, played, is_hasty=h) for played in SCENES for h in (False, True))


def shows(fault: Callable[[Any], None], played: Any, *, is_hasty: bool) -> bool:
    more = {SCENES[0]: (2,), SCENES[3]: (2, "graph")}.get(played, ())
    with late_cupy.loaded("slots", "capture", "memory") as (slots, capture, memory):
        fault(slots)
        try:
            played(Scene(is_hasty=is_hasty, slots=slots, capture=capture, memory=memory), *more)
        except AssertionError:
            return True
    return False
