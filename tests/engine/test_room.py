"""The state of an engine is as large as it was asked to be, or as what is free allows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from lfm2kit.building import capacity
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.engine.room import described, room_for
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from tests.core.small import build, small_spec
from tests.engine.harness import run, tokens_of


def model_with(monkeypatch: pytest.MonkeyPatch, pages: int, context: int | None = 1000) -> LFM2:
    """Return a model in whose memory a state of this many pages would fit, and no more."""
    spec, reference = small_spec(max_position_embeddings=context), ReferenceBackend()
    model = build(spec)
    operators = [leaf.spec for leaf in model.placed.leaves() if leaf.spec.has_state]
    free = sum(reference.state_bytes(operator, Room(pages)) for operator in operators)
    monkeypatch.setattr(capacity, "free_bytes", lambda *_: {"host": free})
    check = partial(capacity.check_state, lambda _: reference, model.placed, 1)
    return replace(model, check_room=check)


def test_it_is_for_the_sequences_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(monkeypatch, 12)
    assert room_for(model, 500, 3) == Room.of_sequences(3, 500) == Room(12)
    with Engine(model, context=500, sequences=3) as engine:
        assert engine.room == Room(12)
    with pytest.raises(Lfm2kitError, match=r"a state of 16 pages needs .*; try fewer sequences"):
        Engine(model, context=500, sequences=4)


def test_a_sequence_has_no_more_than_the_context_that_is_asked_for() -> None:
    """Pages have room for more."""
    greedy = Sampling(temperature=0)
    with Engine(build(small_spec()), context=20, sequences=1) as engine:
        id = engine.add(Request([1, 2, 3], greedy))
        other = engine.add(Request([1, 2, 3], greedy, usual_tokens=5))
        events = run(engine)
        assert [len(tokens_of(events, one)) for one in (id, other)] == [17, 5]
        with pytest.raises(
            Lfm2kitError, match=r"may have \(context=20\); max_tokens may be up to 17"
        ):
            engine.add(Request([1, 2, 3], max_tokens=18))
        with pytest.raises(
            Lfm2kitError, match=r"3 tokens and 18 more .* min_tokens may be up to 17"
        ):
            engine.add(Request([1, 2, 3], min_tokens=18, usual_tokens=5))
        longer = engine.add(Request([1, 2, 3], min_tokens=7, usual_tokens=5))
        assert len(tokens_of(run(engine), longer)) == 7


def test_half_of_what_is_free_is_taken_where_nothing_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert room_for(model_with(monkeypatch, 20)) == Room(10)
    assert room_for(model_with(monkeypatch, 21)) == Room(10)
    assert room_for(model_with(monkeypatch, 10**5)) == Room.of_sequences(16, 1000)
    assert room_for(model_with(monkeypatch, 20), sequences=1) == Room.of_sequences(1, 1000)
    assert room_for(model_with(monkeypatch, 20), sequences=4) == Room(10)
    assert room_for(model_with(monkeypatch, 10**4), context=200) == Room.of_sequences(16, 200)


def test_a_model_without_a_context_takes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_for(model_with(monkeypatch, 30, context=None)) == Room(15)


def test_one_sequence_of_the_context_that_is_asked_for_fits_or_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_with(monkeypatch, 3)
    assert room_for(model, context=300) == Room(3)
    with pytest.raises(Lfm2kitError, match="a state of 5 pages needs"):
        Engine(model, context=600)
    with pytest.raises(Lfm2kitError, match="a state of 1 pages needs"):
        Engine(model_with(monkeypatch, 0))


def test_a_context_beyond_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Lfm2kitError, match="context=1001: the model's context has 1000 tokens"):
        room_for(model_with(monkeypatch, 12), context=1001)
    for wrong in ({"context": 0}, {"sequences": 0}):
        with pytest.raises(Lfm2kitError, match="is 0; expected a whole number, 1 or more"):
            room_for(model_with(monkeypatch, 12), **wrong)


def test_more_tokens_than_a_state_may_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sequences=1048576: a state has room for up to 16777 sequences of 128000 tokens"
    model = model_with(monkeypatch, 12, context=128000)
    with pytest.raises(Lfm2kitError, match=said):
        room_for(model, 128000, 2**20)
    assert room_for(model, 128000, 16777).pages == 16777 * 1000
    assert room_for(model, sequences=2**20) == Room(6)


def test_it_is_reported() -> None:
    said = "12 pages of 128 tokens, for 1536 tokens of all sequences"
    assert described(Room(12)) == said
    with Engine(build(small_spec()), Room(12)) as engine:
        assert said in repr(engine)
