"""Logprobs of prompts are those of one forward over the whole prompt, however it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.logprobs import logprobs
from lfm2kit.engine.requests import FAILED, Event, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.engine.scoring import Scored, scored
from lfm2kit.engine.steps import follow
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.state import Room
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.core.small import build
from tests.engine.harness import (
    BACKENDS,
    GREEDY,
    PAGE_TOKENS,
    SPEC,
    Thirds,
    engine_of,
    model_of,
    run,
    tokens_of,
)
from tests.engine.test_engine import prompt_of


def scores_of(events: list[Event], id: int) -> list[Scored]:
    """Return what the events say of a prompt; they say nothing of another choice's."""
    assert not any(event.prompt for event in events if event.choice)
    return [one for event in events if event.id == id for one in event.prompt]


def in_one_forward(model: LFM2, prompt: list[int], most: int) -> list[Scored]:
    rows = np.arange(len(prompt) - 1, dtype=np.int32)
    logits = model.logits(replace(Batch.of_sequences([prompt]), logits_rows=rows))
    given = [logprobs(row, token, most) for row, token in zip(logits, prompt[1:], strict=True)]
    return [
        Scored(place, prompt[place], logprob, tuple(best))
        for place, (logprob, best) in enumerate(given, 1)
    ]


def scored_by(engine: Engine, *requests: Request) -> list[list[Scored]]:
    ids = [engine.add(request) for request in requests]
    events = run(engine)
    return [scores_of(events, id) for id in ids]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [1, 3, 64, 512])
def test_chunks_of_any_size_give_the_logprobs_of_one_forward(backend: str, budget: int) -> None:
    model, prompt = model_of(backend), prompt_of(70)
    with engine_of(model, 6, budget=budget) as engine:
        other = Request(prompt_of(66, seed=1), GREEDY, max_tokens=3)
        request = Request(prompt, GREEDY, max_tokens=2, prompt_logprobs=20)
        _, scores = scored_by(engine, other, request)
    assert scores == in_one_forward(model, prompt, 20)


def test_tokens_are_those_of_a_prompt_without_logprobs() -> None:
    requests = [
        Request(prompt_of(70), Sampling(seed=1), max_tokens=5, n=2, prompt_logprobs=most)
        for most in (None, 0)
    ]
    with engine_of(model_of(), 6, budget=16) as engine:
        ids = [engine.add(request) for request in requests]
        events = run(engine)
    for choice in (0, 1):
        without, of_scored = (tokens_of(events, id, choice) for id in ids)
        assert without == of_scored


def test_a_prompt_whose_pages_are_known_is_scored_as_a_whole() -> None:
    model, prompt = model_of(), prompt_of(130)
    expected = in_one_forward(model, prompt, 2)
    with engine_of(model, 6) as engine:
        plain = Request(prompt, GREEDY, max_tokens=1)
        asked = replace(plain, prompt_logprobs=2)
        _, first = scored_by(engine, plain, asked)
        (again,) = scored_by(engine, asked)
    assert first == again == expected


def test_a_prompt_that_was_put_back_says_each_token_once() -> None:
    model, prompt = model_of(), prompt_of(200)
    with engine_of(model, 4, budget=32) as engine:
        id = engine.add(Request(prompt, GREEDY, max_tokens=2, prompt_logprobs=1))
        events = [event for _ in range(3) for event in engine.step()]
        (sequence,) = engine._live[id]
        assert sequence.scored == 96
        engine._scheduler.put_back(sequence)
        events += engine.step()
        assert sequence.computed == 96  # of which a page of 64 was found
        events += run(engine)
    assert scores_of(events, id) == in_one_forward(model, prompt, 1)


def test_forks_and_late_masks_score_nothing_twice() -> None:
    model, prompt = model_of(), prompt_of(66)
    constrained = Request(prompt, GREEDY, max_tokens=3, prompt_logprobs=1, constraint=Thirds(), n=2)
    with engine_of(model, 8, budget=48) as engine:
        id = engine.add(constrained)
        events = engine.step()
        fork = engine.fork(id)
        events += run(engine)
    assert scores_of(events, id) == in_one_forward(model, prompt, 1)
    assert scores_of(events, fork) == []
    assert tokens_of(events, fork)


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    with engine_of(model_of(), 2) as engine:
        assert scored_by(engine, Request([5], max_tokens=2, prompt_logprobs=3)) == [[]]


def test_nan_in_a_prompt_ends_that_request_alone_and_names_the_position() -> None:
    class Doubtful:
        def __init__(self, model: LFM2) -> None:
            self._model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

        @contextmanager
        def logits_at_home(self, batch: Batch, *others: Any) -> Iterator[Any]:
            with self._model.logits_at_home(batch, *others) as logits:
                logits[batch.token_ids[batch.logits_rows] == 49] = np.nan
                yield logits

    doubtful: Any = Doubtful(model_of())
    asked = Request([1, 2, 49, 3, 4], GREEDY, max_tokens=2, prompt_logprobs=1, n=2)
    with engine_of(doubtful, 4) as engine:
        plain = Request([1, 2, 49, 3, 4], GREEDY, max_tokens=1)
        ids = [engine.add(plain), engine.add(asked)]
        events = run(engine)
        assert tokens_of(events, ids[0])
        ended = [event for event in events if event.id == ids[1]]
        assert [(event.choice, event.end) for event in ended] == [(0, FAILED), (1, FAILED)]
        assert "token at position 3 has no logprob" in str(ended[0].error)
        assert engine._scheduler.pages.free == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(value: float) -> None:
    logits = np.zeros((2, 4), np.float32)
    logits[1] = value
    with pytest.raises(Lfm2kitError, match="position 2 has no logprob"):
        scored(np.array([0, 1, 2], np.int32), range(2), logits, 1)


@pytest.mark.parametrize("most", [-1, 21, True, 1.5])
def test_other_numbers_of_logprobs_are_refused(most: Any) -> None:
    with pytest.raises(Lfm2kitError, match="prompt_logprobs is"):
        Request([1], prompt_logprobs=most)


def test_ranks_give_the_logprobs_of_one_process() -> None:
    room, request = Room(4, PAGE_TOKENS), Request(prompt_of(70), max_tokens=2, prompt_logprobs=2)

    def rank(job: ThreadTransport) -> Any:
        model = build(SPEC, rewrites=[experts_over_ranks(job.world, job)])
        if job.world.rank:
            return follow(model, job, room)
        with Engine(model, room, budget=32, job=job) as engine:
            return scored_by(engine, request)

    with Engine(build(SPEC), room, budget=32) as engine:
        alone = scored_by(engine, request)
    assert run_ranks(2, rank)[0] == alone
