"""Requests with constraints: masks are obeyed, and one that is late is late for its request alone.

No test depends on time: masks are late because a constraint waits until it is let go.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from lfm2kit.engine.constraints import Allowed
from lfm2kit.engine.drawing import NumPySampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.followed import Followed
from lfm2kit.engine.line import Line
from lfm2kit.engine.masks import Patience
from lfm2kit.engine.requests import CANCELLED, FAILED, LENGTH, STOP, Event, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError
from tests.engine.harness import (
    BACKENDS,
    GREEDY,
    VOCABULARY,
    Thirds,
    engine_of,
    generated,
    in_mask,
    model_of,
    run,
    tokens_of,
    words,
)

PROMPT = [1, 2, 3]
FREE = Request(PROMPT, GREEDY, max_tokens=4)
LONG = 1e9  # seconds
IMPATIENT = Patience(step=0.001, sequence=LONG)


class Steps:
    """A constraint whose texts allow one set of ids after the other, and then end.

    Where the set is an exception, the text raises it.
    """

    def __init__(self, *sets: Any, ends: Sequence[int] = ()) -> None:
        self.sets = sets
        self.ends = (len(sets), *ends)  # numbers of tokens after which a text may end
        self.taken: list[list[int]] = []

    def begin(self) -> StepsText:
        self.taken.append([])
        return StepsText(self, self.taken[-1])


class StepsText:
    def __init__(self, steps: Steps, taken: list[int]) -> None:
        self._steps = steps
        self._taken = taken

    def take(self, token_id: int) -> None:
        self._taken.append(token_id)

    def allowed(self) -> Allowed:
        at, sets = len(self._taken), self._steps.sets
        ids = sets[at] if at < len(sets) else ()
        if isinstance(ids, BaseException):
            raise ids
        return Allowed(words(ids), at in self._steps.ends)


class Gate:
    """The constraint `Thirds`, whose masks wait until the gate is opened, at last when it exits."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._is_reached = threading.Event()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self.open()

    def open(self) -> None:
        self._is_open.set()

    def close(self) -> None:
        self._is_open.clear()
        self._is_reached.clear()

    def reached(self) -> None:
        """Wait until a mask waits for the gate."""
        self._is_reached.wait()

    def begin(self) -> Any:
        text = Thirds().begin()
        allowed = text.allowed

        def waiting() -> Allowed:
            self._is_reached.set()
            self._is_open.wait()
            return allowed()

        text.allowed = waiting  # type: ignore[method-assign]
        return text


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


def threads() -> list[str]:
    """Return the names of the threads that compute masks."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("masks")]


def constrained(constraint: Any, **others: Any) -> Request:
    given = {"sampling": Sampling(seed=4), "max_tokens": 8} | others
    return Request(PROMPT, constraint=constraint, **given)


def ended(engine: Engine, *requests: Request) -> list[Event]:
    """Return the events by which the sequences of these requests end."""
    for request in requests:
        engine.add(request)
    return [event for event in run(engine) if event.end]


def until_ended(engine: Engine, *ids: int) -> list[Event]:
    """Return the events until these requests have ended, however many steps it takes."""
    events: list[Event] = []
    while not set(ids) <= {event.id for event in events if event.end}:
        events += engine.step()
    return events


def test_a_text_has_only_tokens_that_are_allowed_and_ends_where_none_is() -> None:
    sets = [{7}, {1, 2, 49}, {33}]
    with engine_of(model_of(), 2) as engine:
        id = engine.add(constrained(Steps(*sets)))
        events = run(engine)
    tokens = tokens_of(events, id)
    assert len(tokens) == 3
    assert all(token in allowed for token, allowed in zip(tokens, sets, strict=True))
    assert events[-1] == Event(id, 0, None, end=STOP)


def test_stop_ids_are_drawn_only_where_the_text_may_end() -> None:
    stop = 5
    bias = Sampling(temperature=0, logit_bias={stop: 1000})
    with engine_of(model_of(), 2) as engine:
        engine._sampler = Biased()
        request = constrained(Steps({7}, {8}, {9}, {10}, ends=[2]), sampling=bias, stop_ids=[stop])
        assert generated(engine, request) == [[7, 8, stop]]
        late = constrained(request.constraint, sampling=bias, stop_ids=[stop], min_tokens=3)
        assert generated(engine, late) == [[7, 8, 9, 10]]


class Biased:
    """A sampler that takes the allowed token with the largest bias, for equal logits."""

    def draw(self, logits: Any, rows: Any) -> Any:
        return NumPySampler().draw(np.zeros_like(logits), rows)


def test_the_numbers_of_tokens_bound_a_constrained_text_too() -> None:
    with engine_of(model_of(), 2) as engine:
        (event,) = ended(engine, constrained(Steps({7}, {8}, {9}), max_tokens=2))
        assert event.end == LENGTH
        assert event.token_id == 8


def test_a_text_that_must_be_empty_ends_without_a_token() -> None:
    with engine_of(model_of(), 2) as engine:
        events = ended(engine, constrained(Steps(), n=3))
    assert {(event.choice, event.token_id, event.end) for event in events} == {
        (choice, None, STOP) for choice in range(3)
    }


def test_a_constraint_that_fails_ends_its_request_alone() -> None:
    error = Lfm2kitError("the grammar is too large")
    panic = BaseException("a panic")
    requests = [constrained(Steps({7}, error)), FREE, constrained(Steps({7}, panic))]
    with engine_of(model_of(), 4) as engine:
        (alone,) = generated(engine, FREE)
        ids = [engine.add(request) for request in requests]
        events = run(engine)
    ends = {event.id: event for event in events if event.end}
    assert ends[ids[0]].error is error
    assert isinstance(ends[ids[2]].error, Lfm2kitError)
    assert str(ends[ids[2]].error) == "the constraint failed: BaseException: a panic"
    assert [ends[id].end for id in ids] == [FAILED, LENGTH, FAILED]
    assert tokens_of(events, ids[1]) == alone


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (None, "raised TypeError: cannot unpack"),
        (Allowed(np.ones(VOCABULARY, bool), True), "allows array([ True"),  # type: ignore[arg-type]
        (
            Allowed(np.ones((1, 2), np.uint32), True),
            "allows array([[1, 1",
        ),
        (([1], True), "allows [1]; expected words, uint32 [n]"),
        ((words({7}), np.zeros(2)), "raised ValueError: The truth value of an array"),
    ],
)
def test_a_constraint_that_gives_something_else_is_named(allowed: Any, said: str) -> None:
    constraint = Steps()
    text = constraint.begin()
    text.allowed = lambda: allowed  # type: ignore[method-assign]
    constraint.begin = lambda: text  # type: ignore[method-assign]
    with engine_of(model_of(), 4) as engine:
        (alone,) = generated(engine, FREE)
        free, id = engine.add(FREE), engine.add(constrained(constraint))
        events = run(engine)
    assert tokens_of(events, free) == alone
    (event,) = [event for event in events if event.id == id]
    assert isinstance(event.error, Lfm2kitError)
    assert str(event.error).startswith(f"tests.engine.test_masks.Steps {said}")


def test_a_text_that_can_neither_go_on_nor_end_fails() -> None:
    with engine_of(model_of(), 2) as engine:
        (event,) = ended(engine, constrained(Steps({7}, {}, {8})))
    assert str(event.error) == "the constraint allows neither a token nor the end after 1 tokens"


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 64, 70])
def test_a_mask_has_no_bit_beyond_the_vocabulary(vocabulary: int) -> None:
    """Whether the constraint knows fewer tokens or more."""
    for known in (1, 32, 40, 64, 200):
        constraint = Steps(range(known), ends=[0])
        constraint.begin = lambda known=known: AllOf(known)  # type: ignore[method-assign]
        followed = Followed(Request([0], constraint=constraint), vocabulary)
        mask = followed.next(np.empty(0, np.int32)).mask
        assert mask is not None
        allowed = in_mask(mask, len(mask) * 32)
        assert np.flatnonzero(allowed).tolist() == list(range(min(known, vocabulary)))


class AllOf:
    """A text that may have all of some ids."""

    def __init__(self, known: int) -> None:
        self._known = known

    def take(self, token_id: int) -> None:
        pass

    def allowed(self) -> Allowed:
        return Allowed(words(range(self._known), self._known), False)


def test_a_text_takes_each_token_once() -> None:
    constraint = Steps(*[range(VOCABULARY)] * 5)
    with engine_of(model_of(), 2) as engine:
        (tokens,) = generated(engine, constrained(constraint))
        assert not engine._masks._texts
    assert constraint.taken == [tokens]


def test_a_fork_begins_a_text_of_its_own_that_takes_all_tokens() -> None:
    constraint = Steps(*[range(VOCABULARY)] * 5)
    with engine_of(model_of(), 2) as engine:
        id = engine.add(constrained(constraint))
        events = engine.step() + engine.step()
        fork = engine.fork(id)
        events += run(engine)
    tokens = tokens_of(events, id)
    assert constraint.taken == [tokens, tokens[:2] + tokens_of(events, fork)]


def test_an_interrupted_step_goes_on_with_the_same_text() -> None:
    constraint = Steps(*[range(VOCABULARY)] * 5)
    with engine_of(model_of(), 2) as engine:
        (alone,) = generated(engine, constrained(constraint))
        id = engine.add(constrained(constraint))
        events = engine.step()
        logits = engine._steps.logits
        engine._steps.logits = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine._steps.logits = logits  # type: ignore[method-assign]
        assert tokens_of(events + run(engine), id) == alone
    assert constraint.taken == [alone, alone]


def interrupted(batch: Any) -> Any:
    raise KeyboardInterrupt


def test_a_late_mask_holds_up_nobody_else_and_goes_on_with_the_same_tokens() -> None:
    good = constrained(Thirds())
    with (
        engine_of(model_of(), 6, patience=IMPATIENT) as engine,
        Gate() as first,
        Gate() as second,
        Gate() as third,
    ):
        alone = [generated(engine, request)[0] for request in (FREE, good)]
        gates = [first, second, third]
        late = [engine.add(constrained(gate)) for gate in gates]
        others = [engine.add(FREE), engine.add(good)]
        events = until_ended(engine, *others)
        assert [tokens_of(events, id) for id in others] == alone
        assert not any(tokens_of(events, id) for id in late)
        assert all(engine._masks._texts[engine._live[id][0]].line for id in late)
        for gate in gates:
            gate.open()
        events = until_ended(engine, *late)
        assert [tokens_of(events, id) for id in late] == [alone[1]] * 3


def test_a_late_sequence_is_not_computed_until_its_mask_is_there() -> None:
    with engine_of(model_of(), 2, patience=IMPATIENT) as engine, Gate() as gate:
        id, steps = engine.add(constrained(gate)), engine._steps
        assert engine.step() == []
        (sequence,) = engine._live[id]
        assert sequence.left == 1
        engine._steps = None  # type: ignore[assignment]
        for _ in range(3):
            assert engine.step() == []
        assert engine.is_busy
        engine._steps = steps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 100, 128])
@pytest.mark.parametrize("is_put_back", [False, True])
def test_a_prompt_whose_mask_is_late_has_the_same_tokens(
    backend: str, tokens: int, is_put_back: bool
) -> None:
    """Its last token is computed twice, also at the edges of pages."""
    prompt = [token % VOCABULARY for token in range(7, 7 + tokens)]
    given: dict[str, Any] = {"sampling": Sampling(seed=2), "max_tokens": 4}
    with engine_of(model_of(backend), 4, budget=70, patience=IMPATIENT) as engine, Gate() as gate:
        late = engine.add(Request(prompt, constraint=gate, **given))
        for _ in range(3):
            assert engine.step() == []
        (sequence,) = engine._live[late]
        assert sequence.left == 1
        if is_put_back:
            engine._scheduler.put_back(sequence)
            for _ in range(3):
                assert engine.step() == []
        gate.open()
        events = until_ended(engine, late)
        alone = engine.add(Request(prompt, constraint=Thirds(), **given))
        events += until_ended(engine, alone)
        assert tokens_of(events, late) == tokens_of(events, alone)
        assert len(tokens_of(events, late)) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_do_not_depend_on_which_masks_are_late(backend: str) -> None:
    lengths = [1, 40, 64, 90]
    with engine_of(model_of(backend), 6, budget=50) as engine:
        requests = [
            Request([length % VOCABULARY] * length, Sampling(seed=length), 9, constraint=Thirds())
            for length in lengths
        ]
        alone = [generated(engine, request)[0] for request in requests]
    hasty = Patience(step=0, sequence=LONG)
    with engine_of(model_of(backend), 6, budget=50, patience=hasty) as engine:
        ids = [engine.add(request) for request in requests]
        events = until_ended(engine, *ids)
    assert [tokens_of(events, id) for id in ids] == alone


def test_masks_that_take_too_long_end_their_request_alone() -> None:
    now = [0.0]
    patience = Patience(step=0.001, sequence=5, clock=lambda: now[0])
    with engine_of(model_of(), 4, patience=patience) as engine, Gate() as gate:
        free, late = engine.add(FREE), engine.add(constrained(gate))
        until_ended(engine, free)
        gate.reached()
        now[0] = 5.0
        assert engine.step() == []
        now[0] = 5.1
        (event,) = engine.step()
        assert (event.id, event.end) == (late, FAILED)
        assert str(event.error) == (
            "the masks of its constraint took more than 5 seconds; make it simpler"
        )
        assert engine._scheduler.pages.free == 4
        assert not engine.is_busy


def test_the_time_of_late_masks_adds_up() -> None:
    now = [0.0]
    patience = Patience(step=0.001, sequence=5, clock=lambda: now[0])
    with engine_of(model_of(), 4, patience=patience) as engine, Gate() as gate:
        id = engine.add(constrained(gate))
        engine.step()
        gate.reached()
        text = engine._masks._texts[engine._live[id][0]]
        now[0] = 3.0
        gate.open()
        text.future.result()
        gate.close()
        while text.future.done():
            assert not any(event.end for event in engine.step())
        while not text.is_late:
            engine.step()
        gate.reached()
        now[0] = 5.0
        assert engine.step() == []
        now[0] = 6.0
        assert [event.end for event in engine.step()] == [FAILED]


def test_only_the_time_of_late_masks_counts() -> None:
    now = [0.0]

    class Slow(Thirds):
        def begin(self) -> Any:
            now[0] += 100
            return super().begin()

    patience = Patience(step=LONG / 1000, sequence=5, clock=lambda: now[0])
    with engine_of(model_of(), 2, patience=patience) as engine:
        (event,) = ended(engine, constrained(Slow()))
    assert event.end == LENGTH


def test_a_request_may_be_cancelled_while_its_mask_is_computed() -> None:
    with engine_of(model_of(), 4, patience=IMPATIENT) as engine, Gate() as gate:
        (alone,) = generated(engine, constrained(Thirds()))
        id = engine.add(constrained(gate))
        engine.step()
        gate.reached()
        engine.cancel(id)
        assert [event.end for event in engine.step()] == [CANCELLED]
        good = engine.add(constrained(Thirds()))
        assert tokens_of(until_ended(engine, good), good) == alone


def test_a_request_that_is_cancelled_before_its_mask_is_late_holds_up_nobody() -> None:
    with engine_of(model_of(), 6, budget=64, patience=IMPATIENT) as engine, Gate() as gate:
        cancelled = engine.add(Request([5] * 100, constraint=gate))
        engine.step()
        gate.reached()
        engine.cancel(cancelled)
        good = engine.add(constrained(Thirds()))
        assert len(tokens_of(until_ended(engine, good), good)) == 8


def test_the_mask_of_a_prompt_is_begun_with_its_first_chunk() -> None:
    """And if it is late, it is late for no other request."""
    with engine_of(model_of(), 6, budget=64, patience=IMPATIENT) as engine, Gate() as gate:
        late = engine.add(Request([5] * 100, constraint=gate, max_tokens=1))
        engine.step()
        gate.reached()
        good = engine.add(constrained(Thirds()))
        until_ended(engine, good)
        gate.open()
        assert len(tokens_of(until_ended(engine, late), late)) == 1


def test_a_closed_engine_has_no_thread() -> None:
    with engine_of(model_of(), 2) as engine:
        engine.add(FREE)
        run(engine)
        assert not threads()
        engine.add(constrained(Thirds()))
        engine.step()
        assert len(threads()) == 1
    assert not threads()


def test_a_mask_that_never_comes_does_not_keep_an_engine_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lfm2kit.engine.masks.CLOSING", 0)
    with Gate() as gate:
        with engine_of(model_of(), 4, patience=IMPATIENT) as engine:
            engine.add(constrained(gate))
            engine.step()
            gate.reached()
        (left,) = [one for one in threading.enumerate() if one.name == "masks"]
        assert left.daemon
    left.join()


def test_the_thread_of_a_line_that_is_forgotten_ends() -> None:
    line = Line("masks")
    assert line.submit(lambda: 5).result() == 5
    thread = line._thread
    assert thread is not None
    del line
    thread.join()


@pytest.mark.parametrize("has_followers", [False, True])
def test_an_engine_that_is_closed_by_an_error_has_no_thread(
    has_followers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of several ranks, which does not close the others'."""
    monkeypatch.setattr("lfm2kit.engine.steps.Steps.has_followers", has_followers)
    engine = engine_of(model_of(), 2)
    engine.add(constrained(Thirds()))
    engine.step()
    assert threads()
    with pytest.raises(KeyboardInterrupt), engine:
        raise KeyboardInterrupt
    assert not threads()


def test_a_constraint_of_another_type_is_refused() -> None:
    with pytest.raises(Lfm2kitError, match=r"constraint is 'a\+'; expected an object"):
        Request([1], constraint="a+")  # type: ignore[arg-type]
