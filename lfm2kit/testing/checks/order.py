"""What an ordered memory promises: copies and results in order, across streams and threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Block, Captures
from lfm2kit.batch import Batch
from lfm2kit.memory import Mark, Ordered, Timed, is_ordered
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_same
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped

CALLS = 8  # of each thread
LONGEST = 60.0  # seconds that a call of a check may take


@check
def copies_to_the_host_keep_their_order(trial: Trial) -> None:
    """`start_to_host` gives the values of its place in the stream, each copy its caller's own.

    The array may be dropped at once, or written by what is enqueued later.
    """
    for memory in _ordered(trial):
        arrays = [_random(trial, shape) for shape in ((5,), (300, 70), (5,), (0, 7), (300, 70))]
        with memory.stream():
            arriving = [memory.start_to_host(memory.from_host(array)) for array in arrays]
            for array in arrays:
                memory.from_host(-array)  # perhaps where the dropped ones lay
        arrived = [copy.wait() for copy in arriving]
        for array, got, asked in zip(arrays, arrived, arriving, strict=True):
            assert_same(got, array, f"a copy {array.shape} from memory {memory.name!r}")
            assert_same(asked.wait(), array, "the same copy, asked for again")
    for spec, block, memory in _blocks(trial, specs.RMSNorm):
        inputs = random_inputs(spec, trial.rng, 17)
        hidden, delta = block.to_memory(inputs)
        copy = memory.start_to_host(hidden)
        block.compute(hidden, delta)  # may write `hidden`
        assert_same(copy.wait(), inputs[0], f"{spec}: a copy from before a call that writes")


@guards(Promise.REPEATABILITY)
def results_cross_streams(trial: Trial) -> None:
    """What a block returns in one stream is ready in another one that waits for a mark after it."""
    for spec, block, memory in _blocks(trial):
        inputs = random_inputs(spec, trial.rng, 17)
        want = block(*inputs)
        with memory.stream():
            moved = block.to_memory(inputs)
            copied = memory.mark()
            with memory.stream():  # inside, so that it is another one
                memory.wait(copied)
                result = block.compute(*moved)
                done = memory.mark()
            memory.wait(done)
            trial.assert_same(block.to_host(result), want, f"{spec}: a result of another stream")
            memory.wait(memory.mark())  # of its own: nothing to wait for


@check
def batches_cross_streams(trial: Trial) -> None:
    """A batch that was copied in one stream is ready in every other one."""
    for memory in _ordered(trial):
        batch = Batch.of_sequences([np.arange(5), np.arange(300)])
        with memory.stream():
            batch.on(memory)
            with memory.stream():
                for name in ("token_ids", "positions", "cu_seqlens", "logits_rows"):
                    there = memory.to_host(getattr(batch.on(memory), name))
                    assert_same(there, getattr(batch, name), f"{name} of a batch of another stream")


@guards(Promise.REPEATABILITY)
def threads_do_not_disturb_each_other(trial: Trial) -> None:
    """Two threads that call blocks in streams of their own get the bits of each one alone.

    Once each has a block to itself, and once they share one.
    """
    for spec, block, memory in _blocks(trial):
        other = trial.build(spec, trial.random_weights(spec))
        inputs = [random_inputs(spec, trial.rng, rows) for rows in (33, 17)]
        for pair in ((block, other), (block, block)):
            want = [one(*values) for one, values in zip(pair, inputs, strict=True)]
            for got in _at_once(memory, pair, inputs):
                for result, expected in zip(got, want, strict=True):
                    trial.assert_same(result, expected, f"{spec}: a result beside another thread's")


@check
def marks_measure_time(trial: Trial) -> None:
    """`seconds_since` is a number of seconds that is not negative between two places in order."""
    for spec, block, memory in _blocks(trial, specs.RMSNorm, specs.MLP):
        with memory.stream():
            moved = block.to_memory(random_inputs(spec, trial.rng, 17))
            marks = [memory.mark()]
            for _ in range(2):
                block.compute(*moved)
                marks.append(memory.mark())
            first, second, both = (
                marks[b].seconds_since(marks[a]) for a, b in ((0, 1), (1, 2), (0, 2))
            )
        if not all(isinstance(s, float) and s >= 0 for s in (first, second, both)):
            raise CheckFailed(f"{spec}: the calls took {first}, {second} and {both} s together")
        if abs(first + second - both) > 1e-3 + 0.01 * both:
            raise CheckFailed(f"{spec}: {first} s and {second} s are not {both} s together")


@check
def timed_marks_tell_of_the_newest_replay(trial: Trial) -> None:
    """A `timed_mark` measures time, and in a captured forward each replay reaches it anew."""
    timed = [memory for memory in _ordered(trial) if isinstance(memory, Timed)]
    if not timed:
        raise Skipped("its memory has no timed marks")
    for memory in timed:
        with memory.stream():
            marks = [memory.timed_mark() for _ in range(3)]
        _judge_seconds("marks of an idle stream", *pairwise(marks))
    if isinstance(trial.backend, Captures):
        for _, block, ordered in _blocks(trial, specs.Embedding):
            if isinstance(ordered, Timed):
                _judge_replayed_marks(trial.backend, block.block, ordered)


def _judge_replayed_marks(backend: Captures, embedding: Block, memory: Any) -> None:
    marks: list[Mark] = []

    def step(batch: Batch) -> Any:
        marks[:] = [memory.timed_mark()]
        hidden = embedding(batch)
        marks.append(memory.timed_mark())
        return hidden

    batch = Batch.of_sequences([[1, 2, 3]])
    memory.to_host(step(batch.on(memory)))
    replay = backend.capture(step, batch)
    with memory.stream():
        for _ in range(2):
            before = memory.timed_mark()
            memory.to_host(replay(batch))
            first, last = marks
            _judge_seconds("a mark of a replay and one before it", (before, first), (before, last))
            _judge_seconds("two marks of a replay", (first, last))
    replay.close()


def _judge_seconds(what: str, *pairs: tuple[Mark, Mark]) -> None:
    for earlier, later in pairs:
        seconds = later.seconds_since(earlier)
        if not (isinstance(seconds, float) and 0 <= seconds < LONGEST):
            raise CheckFailed(f"{what}: {seconds} s lie between them")


def _at_once(
    memory: Ordered, blocks: Sequence[HostBlock], inputs: Sequence[Sequence[Any]]
) -> list[tuple[Any, Any]]:
    """Return what two threads got from each of their calls."""
    both_here = Barrier(2)

    def calls(block: HostBlock, values: Sequence[Any]) -> list[Any]:
        both_here.wait()
        with memory.stream():
            return [block(*values) for _ in range(CALLS)]

    with ThreadPoolExecutor(2) as threads:
        return list(zip(*threads.map(calls, blocks, inputs), strict=True))


def _blocks(trial: Trial, *kinds: type[Spec]) -> list[tuple[Spec, HostBlock, Ordered]]:
    """Return one block of each kind that the backend builds whole in an ordered memory."""
    _ordered(trial)
    found: list[tuple[Spec, HostBlock, Ordered]] = []
    for spec in trial.first_of_kinds():
        if kinds and not isinstance(spec, kinds):
            continue
        block = trial.build(spec, trial.random_weights(spec))
        if is_ordered(block.memory):
            found.append((spec, block, block.memory))
    return found


def _ordered(trial: Trial) -> list[Ordered]:
    """Return the ordered memories of the backend's blocks; raise `Skipped` if there are none."""
    specs_there = trial.first_of_kinds()
    memories = {memory.name: memory for memory in map(trial.backend.memory, specs_there)}
    ordered = [memory for memory in memories.values() if is_ordered(memory)]
    if not ordered:
        raise Skipped("its memory has no streams")
    return ordered


def _random(trial: Trial, shape: tuple[int, ...]) -> Any:
    return trial.rng.standard_normal(shape, dtype=np.float32)
