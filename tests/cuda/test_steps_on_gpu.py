"""Captured steps with a state on a real GPU: they have the bits of steps that are not captured."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.backend import Room
from lfm2kit.batch import Batch
from lfm2kit.model import LFM2
from lfm2kit.replays import MOST
from lfm2kit.state import ModelState
from tests.random_model import build_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

VOCAB = 1024
Float32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


def plain(model: LFM2, batch: Batch, state: ModelState) -> Float32:
    """Return the logits of a step that is not captured."""
    return np.array(model.home.to_host(model.forward(batch.on(model.home), state.layers)))


def random_ids(rng: np.random.Generator, *shape: int) -> Ids:
    return rng.integers(VOCAB, size=shape, dtype=np.int32)


def model_of(precision: str) -> LFM2:
    return build_random("cuda", precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("chunk", [1, 3, 40, 64])
def test_captured_chunks_have_the_bits_of_plain_ones(chunk: int, precision: str) -> None:
    """A chunk longer than 16 tokens that ran twice, or while captured, would spoil its state."""
    model, rng = model_of(precision), np.random.default_rng(chunk)
    states = [model.new_state(Room(8, 64)) for _ in range(2)]
    pages = [[5, 0, 3, 1], [2, 7, 4, 6]]
    for turn in range(200 // chunk if chunk > 3 else 70):
        ids = random_ids(rng, 2, chunk)
        batch = Batch.of_sequences(list(ids), starts=[turn * chunk] * 2, pages=pages)
        want = plain(model, batch, states[0])
        assert np.array_equal(model.logits(batch, states[1]), want), turn


def test_a_sequence_decodes_as_one_forward_says() -> None:
    model, ids = build_random("cuda"), random_ids(np.random.default_rng(0), 130)
    state = model.new_state(Room(3, 64))
    for end in range(1, 130):
        batch = Batch.of_sequences([ids[end - 1 : end]], starts=[end - 1], pages=[[1, 2, 0]])
        got = model.logits(batch, state)
        if end in (2, 63, 64, 65, 66, 128, 129):
            assert np.array_equal(got, model.logits(Batch.of_sequences([ids[:end]]))), end


def test_replays_that_were_closed_are_captured_anew() -> None:
    model, rng = build_random("cuda"), np.random.default_rng(1)
    states = [model.new_state(Room(1, 64)) for _ in range(2)]
    for turn in range(20):
        batch = Batch.of_sequences([random_ids(rng, 1)], starts=[turn], pages=[[0]])
        assert np.array_equal(model.logits(batch, states[1]), plain(model, batch, states[0]))
        if turn % 6 == 5:
            model._replays.close()


def test_a_state_that_is_gone_takes_its_replays_with_it() -> None:
    model, rng = build_random("cuda"), np.random.default_rng(2)
    model._replays.close()
    kept, gone = (model.new_state(Room(1, 64)) for _ in range(2))
    for turn in range(3):
        batch = Batch.of_sequences([random_ids(rng, 1)], starts=[turn], pages=[[0]])
        for state in (kept, gone):
            model.logits(batch, state)
    assert len(model._replays) == 2
    held = model._replays.nbytes
    del state, gone
    gc.collect()
    assert len(model._replays) == 1
    assert model._replays.nbytes < held


def test_a_replay_in_use_outlives_its_place_among_those_kept() -> None:
    model = build_random("cuda")
    state, rng = model.new_state(Room(1, 64)), np.random.default_rng(3)
    steps = [
        Batch.of_sequences([random_ids(rng, 1)], starts=[turn], pages=[[0]]) for turn in range(3)
    ]
    for step in steps[:2]:
        model.logits(step, state)
    key = model._key(steps[2], state, agreed=())
    with model._replays.using(key, lambda: pytest.fail("it is kept")) as replay:
        for n in range(2, MOST + 2):
            for _ in range(2):
                model.logits(Batch.of_sequences([np.zeros(n, np.int32)]))
        assert key not in model._replays._kept
        logits = model.home.to_host(replay(steps[2]))
    again = model.new_state(Room(1, 64))
    assert np.array_equal(logits, [plain(model, step, again) for step in steps][2])
    assert not hasattr(replay, "_graph"), "it is closed by the last who uses it"


def test_steps_are_queued_without_waiting() -> None:
    """The host is ahead of the device by several steps; each takes its own batch."""
    import cupy

    model, rng = build_random("cuda"), np.random.default_rng(4)
    captured, other = (model.new_state(Room(64, 64)) for _ in range(2))
    pages: Any = np.arange(64, dtype=np.int32)[:, None]
    steps = [
        Batch.of_sequences(list(random_ids(rng, 64, 1)), starts=[turn] * 64, pages=pages)
        for turn in range(12)
    ]
    want = [plain(model, step, other) for step in steps]
    plain(model, steps[0], captured)
    replay = model.backend.capture(lambda batch: model.forward(batch, captured.layers), steps[0])  # type: ignore[attr-defined]
    with cupy.cuda.Stream(non_blocking=True):
        got = [replay(step).copy() for step in steps]
        host = [array.get() for array in got]
    for turn, (a, b) in enumerate(zip(host, want, strict=True)):
        assert np.array_equal(a, b), turn
    replay.close()


def test_a_prompt_in_chunks_then_tokens() -> None:
    """Forms change from call to call, as in a server: each is captured at its second use."""
    model, rng = build_random("cuda"), np.random.default_rng(5)
    ids = random_ids(rng, 3, 90)
    want = model.logits(Batch.of_sequences(list(ids)))
    state = model.new_state(Room(9, 64))
    for _ in range(3):
        pages: Any = rng.permutation(9).astype(np.int32).reshape(3, 3)
        for a, b in pairwise((0, 30, 60, 80, *range(81, 91))):
            batch = Batch.of_sequences(list(ids[:, a:b]), starts=[a] * 3, pages=pages)
            got = model.logits(batch, state)
        assert np.array_equal(got, want)
