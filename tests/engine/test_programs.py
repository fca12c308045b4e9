"""Requests come, fork, are put back, are cancelled and end, in any order.

Every sequence has the tokens that it would have alone, and no page is lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lfm2kit.engine.drawing import Sampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.guesses import RepeatedText
from lfm2kit.engine.requests import CANCELLED, LENGTH, STOP, Event, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.engine.scoring import Scored
from tests.engine.harness import (
    BACKENDS,
    MOST_STEPS,
    PAGE_TOKENS,
    VOCABULARY,
    KeyedSampler,
    Thirds,
    alone,
    engine_of,
    model_of,
)
from tests.engine.test_guesses import Wrong
from tests.engine.test_scoring import in_one_forward

MOST_LIVE = 6


class Known(NamedTuple):
    """What a program knows of a sequence."""

    request: Request
    seed: int
    ids: list[int]
    begin: int  # tokens that it had when it was added or forked


class Programs(RuleBasedStateMachine):
    """A machine that does what callers of an engine do."""

    backend = "reference"
    judge: Sampler = KeyedSampler()

    @initialize(pages=st.integers(3, 7), budget=st.sampled_from([1, 3, 16, 100]))
    def begin(self, pages: int, budget: int) -> None:
        self.engine = self.new_engine(pages, budget)
        self.known: dict[tuple[int, int], Known] = {}
        self.ended: dict[tuple[int, int], str | None] = {}
        self.scored: dict[int, list[Scored]] = {}  # tokens of prompts, by request

    def new_engine(self, pages: int, budget: int) -> Engine:
        self.model = model_of(self.backend)
        return engine_of(self.model, pages, budget=budget)

    @precondition(lambda self: len(self.live) < MOST_LIVE)
    @rule(
        tokens=st.sampled_from([1, 2, 5, 63, 64, 65, 100, 128]),
        seed=st.integers(0, 3),  # so that some prompts are equal
        temperature=st.sampled_from([0.0, 1.0]),
        max_tokens=st.sampled_from([1, 2, 9, 40]),
        min_tokens=st.sampled_from([0, 1]),
        n=st.sampled_from([1, 1, 3]),
        constraint=st.sampled_from([None, Thirds()]),
        prompt_logprobs=st.sampled_from([None, None, 2]),
        guesses=st.sampled_from([None, RepeatedText, Wrong]),
    )
    def add(self, tokens: int, seed: int, temperature: float, n: int, **others: Any) -> None:
        prompt = np.random.default_rng(seed).integers(VOCABULARY, size=tokens)
        sampling = Sampling(temperature=temperature, seed=seed)
        request = Request(prompt, sampling, stop_ids=(1, 2, 3), n=n, **others)
        self._know(id := self.engine.add(request), request, prompt.tolist())
        self.scored[id] = []

    @precondition(lambda self: self.live)
    @rule(steps=st.sampled_from([1, 2, 5, 20]))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._hear(self.engine.step())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        id, choice = data.draw(st.sampled_from(self.live))
        origin = self.known[id, choice]
        self._know(self.engine.fork(id, choice), origin.request, origin.ids)

    @precondition(lambda self: self.engine._scheduler._running)
    @rule()
    def put_back(self) -> None:
        self.engine._scheduler.put_back(self.engine._scheduler._running[-1])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), alone=st.booleans())
    def cancel(self, data: st.DataObject, alone: bool) -> None:
        id, choice = data.draw(st.sampled_from(self.live))
        self.engine.cancel(id, choice if alone else None)
        self._hear(self.engine.step())

    @invariant()
    def only_those_that_run_have_pages(self) -> None:
        if hasattr(self, "engine"):
            scheduler = self.engine._scheduler
            used = {page for one in scheduler._running for page in one.pages}
            assert scheduler.pages.free == self.engine.room.pages - len(used)
            assert not any(one.pages for one in scheduler._waiting)

    @property
    def live(self) -> list[tuple[int, int]]:
        return [name for name in self.known if name not in self.ended]

    def _know(self, id: int, request: Request, ids: list[int]) -> None:
        for one in self.engine._live[id]:
            self.known[id, one.choice] = Known(request, one.seed, list(ids), len(ids))

    def _hear(self, events: list[Event]) -> None:
        for event in events:
            name = event.id, event.choice
            assert name not in self.ended
            assert event.error is None
            if event.prompt:  # never of a fork
                self.scored[event.id] += event.prompt
            if event.token_id is not None:
                self.known[name].ids.append(event.token_id)
            if event.end is not None:
                self.ended[name] = event.end

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(MOST_STEPS):
            if not self.engine.is_busy:
                break
            self._hear(self.engine.step())
        assert self.ended.keys() == self.known.keys()
        assert self.engine._scheduler.pages.free == self.engine.room.pages
        self.engine.close()
        for name, known in self.known.items():
            self._judge(known, self.ended[name])
        for id, scores in self.scored.items():
            self._judge_scores(self.known[id, 0].request, self.ended[id, 0], scores)

    def _judge(self, known: Known, end: str | None) -> None:
        new = known.ids[known.begin :]
        same = known.request, known.seed, known.ids, known.begin
        assert new == alone(self.model, *same, self.judge)
        stops = [token in known.request.stop_ids for token in new]
        assert not any(stops[:-1])
        if end != CANCELLED:
            is_stop = stops[-1]
            count = len(known.ids) - len(known.request.ids)
            assert is_stop or count == known.request.max_tokens
            assert end == (STOP if is_stop else LENGTH)

    def _judge_scores(self, request: Request, end: str | None, scores: list[Scored]) -> None:
        most, prompt = request.prompt_logprobs, request.ids.tolist()
        expected = [] if most is None else in_one_forward(self.model, prompt, most)
        assert scores == expected[: len(scores)]
        assert end == CANCELLED or len(scores) == len(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_have_the_tokens_that_they_have_alone(backend: str) -> None:
    run(backend, examples=10)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_more_sequences_have_the_tokens_that_they_have_alone(backend: str) -> None:
    run(backend, examples=400)


def run(backend: str, examples: int, programs: type[Programs] = Programs) -> None:
    machine: Any = type("Programs", (programs,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


assert PAGE_TOKENS == 64  # the lengths above lie at its edges
