"""Steps that begin before the tokens of the last one are read change nothing but the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from lfm2kit.engine.drawing import NotANumber, NumPySampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.guesses import RepeatedText
from lfm2kit.engine.requests import CANCELLED, FAILED, LENGTH, STOP, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import random_weights
from lfm2kit.testing.device import DeviceMemory
from lfm2kit.testing.simple_server import SimpleServer
from lfm2kit.testing.tiny_model import build_tiny_model
from tests.conformance.ahead import DeviceSampler
from tests.conformance.crossing import DeviceBackend
from tests.engine import test_programs
from tests.engine.harness import (
    GREEDY,
    SPEC,
    VOCABULARY,
    KeyedSampler,
    Thirds,
    engine_of,
    generated,
    model_of,
    run,
    tokens_of,
)
from tests.engine.test_engine import ends_of, prompt_of

PAGES = 6


@pytest.fixture
def engine() -> Iterator[Engine]:
    with engine_on_device() as engine:
        yield engine


def device_model(memory: DeviceMemory | None = None) -> tuple[LFM2, DeviceBackend]:
    """Return the model of the harness on a device, captured, and the device's backend."""
    backend = DeviceBackend(memory)
    weights = random_weights(SPEC, 0)
    return build_tiny_model(SPEC, weights, ReferenceBackend(), backend), backend


def engine_on_device(sampler: Any = None, pages: int = PAGES) -> Engine:
    model, backend = device_model(DeviceMemory(delay=1e-3))
    return engine_of(model, pages, sampler=DeviceSampler(backend.device, sampler or KeyedSampler()))


def log_of(engine: Engine) -> list[tuple[str, int]]:
    sampler: Any = engine._sampler
    log: list[tuple[str, int]] = sampler.log
    return log


def early_of(engine: Engine) -> list[int]:
    """Return which steps have begun before the tokens of the last one were read."""
    order = {entry: place for place, entry in enumerate(log_of(engine))}
    numbers = range(1, len({number for _, number in order}))
    return [n for n in numbers if order["begin", n] < order["end", n - 1]]


def plainly(*requests: Request) -> list[list[int]]:
    """Return the tokens of requests without a device."""
    with engine_of(model_of(), PAGES) as engine:
        return generated(engine, *requests)


def ahead_of(engine: Engine, request: Request, tokens: int = 5) -> tuple[int, list[Any]]:
    """Return a request's id and events up to where a step has begun behind its last token."""
    id, events = engine.add(request), []
    while len(tokens_of(events, id)) < tokens or not engine._ahead.chunks:
        events += engine.step()
        assert engine.is_busy
    return id, events


class Programs(test_programs.Programs):
    """Programs in which most steps can begin ahead; results must be those of the host."""

    judge = NumPySampler()
    ahead: list[int]  # steps of each program

    def new_engine(self, pages: int, budget: int) -> Engine:
        self.model = model_of("reference")  # the judge's
        model, backend = device_model()
        sampler = DeviceSampler(backend.device, NumPySampler())
        return engine_of(model, pages, budget=max(budget, 16), sampler=sampler)

    @precondition(lambda self: len(self.live) < 3)
    @rule(
        tokens=st.sampled_from([1, 5, 50, 64]),
        seed=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 1.0]),
        penalty=st.sampled_from([1.0, 1.3]),
        n=st.sampled_from([1, 1, 1, 2]),
        max_tokens=st.sampled_from([9, 40]),
        min_tokens=st.sampled_from([0, 9]),
        stop_ids=st.sampled_from([(), (1,), (1, 2, 3)]),
        logprobs=st.sampled_from([None, None, None, None, 0]),
    )
    def add(
        self, tokens: int, seed: int, temperature: float, n: int, penalty: float = 1, **others: Any
    ) -> None:
        prompt = np.random.default_rng(seed).integers(VOCABULARY, size=tokens)
        sampling = Sampling(
            temperature=temperature, seed=seed, repetition_penalty=penalty,
            frequency_penalty=penalty - 1,
        )  # fmt: skip
        request = Request(prompt, sampling, n=n, **others)
        self._know(id := self.engine.add(request), request, prompt.tolist())
        self.scored[id] = []

    @precondition(lambda self: self.live)
    @rule(steps=st.sampled_from([5, 20]))
    def step(self, steps: int) -> None:
        super().step(steps)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            assert not self.engine._ahead.chunks
            self.ahead.append(self.count())

    def count(self) -> int:
        """Return how many steps have begun ahead."""
        return len(early_of(self.engine))


def run_programs(
    examples: int, backend: str = "reference", programs: type[Programs] = Programs
) -> list[int]:
    """Return how many steps of each program have begun ahead."""
    counted: Any = type("Programs", (programs,), {"ahead": []})
    test_programs.run(backend, examples, counted)
    ahead: list[int] = counted.ahead
    return ahead


def test_sequences_have_the_tokens_that_they_have_alone() -> None:
    ahead = run_programs(3)
    assert sum(ahead) > 30, ahead


@pytest.mark.long
def test_many_more_sequences_have_the_tokens_that_they_have_alone() -> None:
    assert sum(run_programs(400)) > 4000


def test_a_step_begins_before_the_tokens_of_the_last_one_are_read(engine: Engine) -> None:
    request = Request(prompt_of(5), GREEDY, max_tokens=12)
    assert generated(engine, request) == plainly(request)
    assert len(log_of(engine)) == 2 * 12
    assert early_of(engine) == list(range(3, 12))  # a form's first two steps run and capture it


def test_penalties_count_tokens_that_nobody_has_read() -> None:
    requests = [
        Request(
            prompt_of(9, seed),
            Sampling(
                temperature=seed % 3 / 2, seed=seed, repetition_penalty=1.3,
                presence_penalty=0.5 * (seed % 2), frequency_penalty=0.9, logit_bias={3: 1.5},
            ),
            max_tokens=20, min_tokens=seed, stop_ids=(1, 2, 3, 4, 5),
        )
        for seed in range(6)
    ]  # fmt: skip
    with engine_of(model_of(), PAGES, sampler=NumPySampler()) as plain:
        expected = generated(plain, *requests)
    with engine_on_device(NumPySampler()) as engine:
        assert generated(engine, *requests) == expected
        assert early_of(engine)


@pytest.mark.parametrize(
    "changed",
    [{"logprobs": 2}, {"prompt_logprobs": 1}, {"n": 2}],
    ids=["logprobs", "prompt", "choices"],
)
def test_what_a_step_is_asked_beside_tokens_is_the_same(
    engine: Engine, changed: dict[str, Any]
) -> None:
    request = Request(prompt_of(5), Sampling(seed=3), max_tokens=9, **changed)
    with engine_of(model_of(), PAGES) as plain:
        plain.add(request)
        expected = run(plain)
    engine.add(request)
    assert sorted(run(engine), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    "changed",
    [{"logprobs": 0}, {"constraint": Thirds()}, {"guesses": RepeatedText}],
    ids=["logprobs", "constraint", "guesses"],
)
def test_steps_whose_tokens_the_host_needs_do_not_begin_ahead(
    engine: Engine, changed: dict[str, Any]
) -> None:
    request = Request([1, 2, 3, 4] * 3, Sampling(seed=3), max_tokens=9, **changed)
    assert generated(engine, request) == plainly(request)
    assert log_of(engine) == []


def test_a_new_request_begins_two_steps_later_at_most(engine: Engine) -> None:
    """One step has begun when it comes, and its own is the next."""
    ahead_of(engine, Request(prompt_of(5), GREEDY, max_tokens=40))
    id = engine.add(Request(prompt_of(3), GREEDY, max_tokens=8))
    engine.step()
    assert tokens_of(engine.step(), id)


def test_threads_take_turns(engine: Engine) -> None:
    """Each has streams of its own, and a step ends in another one than it began in."""
    requests = [Request(prompt_of(5, seed), Sampling(seed=seed), max_tokens=30) for seed in (1, 2)]
    ids, events = [engine.add(request) for request in requests], list[Any]()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for thread in cycle((one, other)):
            if not engine.is_busy:
                break
            events += thread.submit(engine.step).result()
    assert [tokens_of(events, id) for id in ids] == plainly(*requests)
    assert len(early_of(engine)) > 20


def test_a_step_is_not_left_where_servers_wait_for_the_host() -> None:
    model, backend = device_model()
    assert model.may_be_left
    served: Any = [SimpleServer(backend.device.channel(1, 1.0))]
    assert not replace(model, servers=served).may_be_left
    assert not replace(model, may_capture=False).may_be_left


def test_where_pages_run_out_the_youngest_is_put_back() -> None:
    requests = [Request(prompt_of(60, seed), max_tokens=30) for seed in (1, 2, 3)]
    with engine_on_device(pages=3) as engine:
        assert generated(engine, *requests) == plainly(*requests)
        assert early_of(engine)
        assert engine._scheduler.pages.free == 3


def test_a_sequence_that_stops_leaves_nothing_of_the_step_that_had_begun(engine: Engine) -> None:
    free = plainly(Request(prompt_of(5), Sampling(seed=1), max_tokens=20))[0]
    stop = next(token for token in free[6:] if token not in free[:6])
    request = Request(prompt_of(5), Sampling(seed=1), stop_ids=[stop])
    id = engine.add(request)
    events = run(engine)
    assert tokens_of(events, id) == free[: free.index(stop) + 1]
    assert ends_of(events) == {(id, 0): STOP}
    assert engine._scheduler.pages.free == PAGES
    again = Request(prompt_of(5), Sampling(seed=1), max_tokens=3)
    assert generated(engine, again) == [free[:3]]


def test_a_step_that_has_begun_counts_for_none_that_are_cancelled(engine: Engine) -> None:
    request = Request(prompt_of(60), Sampling(seed=1), max_tokens=9)
    id, _ = ahead_of(engine, request)
    engine.cancel(id)
    assert engine._scheduler.pages.free == PAGES
    other = Request(prompt_of(60, 2), Sampling(seed=1), max_tokens=9)
    second = engine.add(other)
    events = run(engine)
    assert ends_of(events) == {(id, 0): CANCELLED, (second, 0): LENGTH}
    assert tokens_of(events, id) == []
    assert [tokens_of(events, second)] == plainly(other)


def test_a_fork_and_a_new_request_join_where_a_step_has_begun(engine: Engine) -> None:
    request = Request(prompt_of(60), Sampling(seed=1), max_tokens=30)
    id, events = ahead_of(engine, request)
    fork, known = engine.fork(id), tokens_of(events, id)
    other = engine.add(Request(prompt_of(3), GREEDY, max_tokens=8))
    events += run(engine)
    assert [tokens_of(events, id)] == plainly(request)
    assert [tokens_of(events, other)] == plainly(Request(prompt_of(3), GREEDY, max_tokens=8))
    with engine_of(model_of(), PAGES) as plain:
        id, events_ = plain.add(request), []
        while len(tokens_of(events_, id)) < len(known):
            events_ += plain.step()
        same = plain.fork(id)
        assert tokens_of(run(plain), same) == tokens_of(events, fork)


def test_one_that_waits_in_vain_holds_up_nobody() -> None:
    """It needs two pages, of which one is free."""
    request = Request(prompt_of(70), Sampling(seed=1), max_tokens=20)
    late = Request(prompt_of(70, 2), Sampling(seed=2), max_tokens=2)
    with engine_on_device(pages=3) as engine:
        id, events = ahead_of(engine, request)
        waits = engine.add(late)
        events += run(engine)
        assert [tokens_of(events, one) for one in (id, waits)] == [
            *plainly(request), *plainly(late),
        ]  # fmt: skip
        assert {16, 17, 18, 19} < {*early_of(engine)}  # up to the one that ends it


def test_closing_waits_for_the_step_that_has_begun(engine: Engine) -> None:
    ahead_of(engine, Request(prompt_of(5)))
    engine.close()
    last = max(number for _, number in log_of(engine))
    assert log_of(engine)[-1] == ("end", last)
    with pytest.raises(Lfm2kitError, match="closed"):
        engine.step()


def breaks(engine: Engine, method: str, error: BaseException) -> Callable[[], None]:
    """Make the next call of a method raise; return what mends it."""
    sampler: Any = engine._sampler
    target = sampler if method == "begin" else engine._ahead._begun.drawing  # type: ignore[union-attr]
    before = getattr(target, method)

    def broken(*arguments: Any) -> Any:
        setattr(target, method, before)
        raise error

    setattr(target, method, broken)
    return lambda: setattr(target, method, before)


def test_a_step_that_cannot_begin_ends_its_sequences_behind_their_last_tokens(
    engine: Engine,
) -> None:
    request = Request(prompt_of(5), GREEDY, max_tokens=20)
    id, events = ahead_of(engine, request)
    breaks(engine, "begin", OSError("no device"))
    events += engine.step()
    assert tokens_of(events, id) == plainly(request)[0][:6]
    assert ends_of(events) == {}
    begun = len(log_of(engine))
    (failed,) = engine.step()
    assert (failed.end, str(failed.error)) == (FAILED, "no device")
    assert len(log_of(engine)) == begun  # nothing follows it
    assert not engine.is_busy
    assert engine._scheduler.pages.free == PAGES
    assert generated(engine, request) == plainly(request)


def test_a_step_that_fails_on_the_device_ends_its_sequences(engine: Engine) -> None:
    request = Request(prompt_of(5), GREEDY, max_tokens=20)
    id, _ = ahead_of(engine, request)
    breaks(engine, "end", OSError("no device"))
    assert ends_of(engine.step()) == {(id, 0): FAILED}
    assert engine._scheduler.pages.free == PAGES
    assert not engine._ahead.chunks
    assert generated(engine, request) == plainly(request)


@pytest.mark.parametrize("method", ["begin", "end"])
def test_an_interrupted_step_can_be_made_again(engine: Engine, method: str) -> None:
    request = Request(prompt_of(70), Sampling(seed=4), max_tokens=20)
    id, events = ahead_of(engine, request)
    breaks(engine, method, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine._scheduler.pages.free == PAGES
    events += run(engine)
    assert [tokens_of(events, id)] == plainly(request)
    assert ends_of(events) == {(id, 0): LENGTH}


def test_a_row_without_a_token_ends_its_sequence_alone() -> None:
    class Doubtful(KeyedSampler):
        def _drawn(self, logits: Any, row: Any) -> Any:
            is_bad = row.seed == 5 and row.position == 12
            return NotANumber(12, "it is NaN") if is_bad else super()._drawn(logits, row)

    good = Request(prompt_of(5), Sampling(seed=4), max_tokens=20)
    bad = Request(prompt_of(5, 1), Sampling(seed=5), max_tokens=20)
    with engine_on_device(Doubtful()) as engine:
        ids = [engine.add(request) for request in (good, bad)]
        events = run(engine)
        assert ends_of(events) == {(ids[0], 0): LENGTH, (ids[1], 0): FAILED}
        expected = plainly(good, bad)
        assert [tokens_of(events, id) for id in ids] == [expected[0], expected[1][: 12 - 5]]
        assert engine._scheduler.pages.free == PAGES
