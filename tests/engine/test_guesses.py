"""Guesses of tokens: they save steps, and change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfm2kit.engine.engine import Engine
from lfm2kit.engine.guesses import MOST_GUESSES, Guesses, RepeatedText
from lfm2kit.engine.requests import FAILED, Event, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.engine.steps import follow
from lfm2kit.errors import Lfm2kitError
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.state import Room
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.core.small import build
from tests.engine.harness import (
    BACKENDS,
    GREEDY,
    PAGE_TOKENS,
    SPEC,
    VOCABULARY,
    Thirds,
    engine_of,
    generated,
    model_of,
    run,
    tokens_of,
)

PROMPT = [3, 1, 4, 1, 5]


class Foreseen:
    """Guesses a text that is known, and every `wrong`-th token of it wrongly."""

    def __init__(self, text: list[int], wrong: int | None = None) -> None:
        self.text = text
        self.wrong = wrong
        self.heard: list[tuple[int, int]] = []

    def guess(self, ids: Any, most: int) -> list[int]:
        guesses = self.text[len(ids) : len(ids) + most]
        if self.wrong is not None:
            for i in range(len(guesses)):
                if (len(ids) + i) % self.wrong == 0:
                    guesses[i] = (guesses[i] + 1) % VOCABULARY
        return guesses

    def told(self, guessed: int, right: int) -> None:
        self.heard.append((guessed, right))


ASKED = {
    "greedy": Request(PROMPT, GREEDY, max_tokens=23),
    "drawn": Request(PROMPT, Sampling(seed=5), max_tokens=23, logprobs=3),
    "with penalties": Request(
        PROMPT, Sampling(repetition_penalty=1.2, frequency_penalty=0.5, seed=1), max_tokens=23
    ),
    "until an end": Request(
        PROMPT, Sampling(seed=2), max_tokens=60, min_tokens=9, stop_ids=range(25)
    ),
    "over pages": Request(range(1, 49), Sampling(seed=3), max_tokens=2 * PAGE_TOKENS),
    "after a prompt with logprobs": Request(PROMPT, GREEDY, max_tokens=9, prompt_logprobs=1),
}


def events_of(backend: str, request: Request) -> tuple[list[Event], int]:
    """Return what comes of a request, and after how many steps."""
    with engine_of(model_of(backend), 4, sampler=None) as engine:
        engine.add(request)
        events, steps = [], 0
        while engine.is_busy:
            events += engine.step()
            steps += 1
        return events, steps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [None, 1, 3])
@pytest.mark.parametrize("asked", ASKED)
def test_guesses_change_no_token_and_no_logprob(
    asked: str, wrong: int | None, backend: str
) -> None:
    request = ASKED[asked]
    plain, steps = events_of(backend, request)
    text = [*request.ids.tolist(), *(one.token_id for one in plain if one.token_id is not None)]
    foreseen = Foreseen(text, wrong)
    guessed, fewer = events_of(backend, replace(request, guesses=lambda: foreseen))
    assert guessed == plain
    if wrong is None:
        assert fewer <= 2 + steps // 4
        assert all(guessed == right for guessed, right in foreseen.heard[:-1])
    elif wrong == 1:
        assert fewer == steps
        assert not any(right for _, right in foreseen.heard)
    else:
        assert {right for _, right in foreseen.heard} <= {0, 1, 2}


def test_several_sequences_with_and_without_guesses_have_the_tokens_that_they_have_alone() -> None:
    asked = [
        Request(PROMPT, Sampling(seed=seed), max_tokens=40, n=2, guesses=guesses)
        for seed, guesses in enumerate([None, RepeatedText, Wrong, RepeatedText])
    ]

    def told(*requests: Request) -> list[list[list[int]]]:
        with engine_of(model_of(), 5, budget=20) as engine:  # some are put back
            ids = [engine.add(request) for request in requests]
            events = run(engine)
        return [[tokens_of(events, id, choice) for choice in range(2)] for id in ids]

    assert told(*asked) == [told(replace(one, guesses=None))[0] for one in asked]


class Wrong:
    """Guesses what is hardly ever right."""

    def guess(self, ids: Any, most: int) -> list[int]:
        return [0] * most

    def told(self, guessed: int, right: int) -> None:
        pass


def test_a_constrained_sequence_is_not_guessed() -> None:
    def never() -> Guesses:
        raise AssertionError("nobody knows the masks of its next tokens")

    request = Request(PROMPT, GREEDY, max_tokens=4, constraint=Thirds(), guesses=never)
    with engine_of(model_of(), 2) as engine:
        assert generated(engine, request) == generated(engine, replace(request, guesses=None))


def test_more_guesses_than_asked_for_are_left_out() -> None:
    class Many(Wrong):
        def guess(self, ids: Any, most: int) -> list[int]:
            assert 1 <= most <= MOST_GUESSES
            return [0] * 50

    plain = Request(PROMPT, GREEDY, max_tokens=9)
    with engine_of(model_of(), 2) as engine:
        (tokens, guessed) = generated(engine, plain, replace(plain, guesses=Many))
    assert tokens == guessed


class Given(Wrong):
    """Guesses what it is given, or raises it."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def guess(self, ids: Any, most: int) -> Any:
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given(ids) if callable(self.given) else self.given


class Deaf(Wrong):
    """Guesses, but does not listen."""

    def told(self, guessed: int, right: int) -> None:
        raise KeyError("guessed")


def no_guesses() -> Any:
    raise OSError("no draft model")


def written_to(ids: Any) -> list[int]:
    ids[0] = 0
    return [1]


NAME = "tests.engine.test_guesses."


@pytest.mark.parametrize(
    ("guesses", "said"),
    [
        (
            lambda: Given([1, VOCABULARY]),
            f"{NAME}Given guesses wrongly: token id {VOCABULARY}",
        ),
        (lambda: Given([-1]), f"{NAME}Given guesses wrongly: token id -1 lies outside the vocabul"),
        (lambda: Given([2**40]), f"{NAME}Given guesses wrongly: the guesses reach from"),
        (
            lambda: Given([1.5]),
            f"{NAME}Given guesses wrongly: the guesses are not integers, but",
        ),
        (lambda: Given([[1]]), f"{NAME}Given guesses wrongly: shape (1, 1), not one row"),
        (lambda: Given(None), f"{NAME}Given guesses wrongly: the guesses are not integers"),
        (lambda: Given(ValueError("a\nb")), f"{NAME}Given raised ValueError: a; its traceback: "),
        (lambda: Given(SystemExit(3)), f"{NAME}Given raised SystemExit: 3"),
        (lambda: Given(written_to), f"{NAME}Given raised ValueError: assignment destination is re"),
        (Deaf, f"{NAME}Deaf raised KeyError: 'guessed'"),
        (no_guesses, f"{NAME}no_guesses raised OSError: no draft model"),
        (lambda: 5, "builtins.int has no methods guess and told"),
    ],
)
def test_guesses_that_go_wrong_end_their_request_alone(guesses: Any, said: str) -> None:
    plain = Request(PROMPT, GREEDY, max_tokens=6)
    with engine_of(model_of(), 4) as engine:
        (alone,) = generated(engine, plain)
        free = engine.add(plain)
        id = engine.add(replace(plain, guesses=guesses, n=2))
        events = run(engine)
        assert engine._scheduler.pages.free == 4
    assert tokens_of(events, free) == alone
    ends = [event for event in events if event.id == id and event.end]
    assert [event.end for event in ends] == [FAILED] * 2
    assert all(str(event.error).startswith(said) for event in ends)


def test_ranks_make_the_same_forwards_with_guesses() -> None:
    requests = [
        Request(PROMPT, Sampling(seed=seed), max_tokens=20, guesses=RepeatedText) for seed in (0, 1)
    ]
    room = Room(4, PAGE_TOKENS)
    plain = [replace(one, guesses=None) for one in requests]

    def rank(job: ThreadTransport) -> Any:
        model = build(SPEC, rewrites=[experts_over_ranks(job.world, job)])
        if job.world.rank:
            return follow(model, job, room)
        with Engine(model, room, job=job) as engine:
            return generated(engine, *requests), generated(engine, *plain)

    guessed, expected = run_ranks(2, rank)[0]
    assert guessed == expected


def guess_after(text: list[int], most: int = MOST_GUESSES) -> list[int]:
    return RepeatedText().guess(np.array(text, np.int32), most)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([], []),
        ([1, 2], []),
        ([1, 2, 3, 1, 2], [3, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 4, 1, 2], [4, 1, 2]),  # the last place
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1, 2, 4, 7, 1]),  # the longer match
        ([5] * 12, [5]),
    ],
)
def test_a_text_is_guessed_to_repeat_itself(text: list[int], expected: list[int]) -> None:
    assert guess_after(text) == expected
    assert guess_after(text, 1) == expected[:1]


def test_it_guesses_more_the_more_guesses_were_right() -> None:
    guesses, text = RepeatedText(), np.array([*range(20), 0, 1, 2], np.int32)
    for guessed, right, following in ((7, 0, 1), (1, 1, 3), (3, 3, 7), (7, 2, 5)):
        guesses.told(guessed, right)
        assert len(guesses.guess(text, MOST_GUESSES)) == following


@pytest.mark.parametrize("guesses", [3, RepeatedText()])
def test_what_makes_no_guesses_is_refused(guesses: Any) -> None:
    with pytest.raises(Lfm2kitError, match=r"^guesses is .*; expected what makes an object"):
        Request(PROMPT, guesses=guesses)
