"""What an engine refuses, how sequences end, and what failures leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import CANCELLED, FAILED, LENGTH, STOP, Event, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.state import Room
from tests.core.small import build, small_spec
from tests.engine.harness import (
    BACKENDS,
    GREEDY,
    PAGE_TOKENS,
    SPEC,
    VOCABULARY,
    alone,
    engine_of,
    generated,
    model_of,
    run,
    tokens_of,
)


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(VOCABULARY, size=tokens).tolist()
    return ids


def ends_of(events: list[Event]) -> dict[tuple[int, int], str]:
    return {(event.id, event.choice): event.end for event in events if event.end is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 16, 512])
def test_chunks_of_any_size_give_the_tokens_of_one_forward(backend: str, budget: int) -> None:
    model, request = model_of(backend), Request(prompt_of(70), GREEDY, max_tokens=12)
    with engine_of(model, 4, budget=budget) as engine:
        (tokens,) = generated(engine, request)
    ids = [*request.ids.tolist(), *tokens]
    assert tokens == alone(model, request, 0, ids, len(request.ids))
    assert len(tokens) == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_sampler_gives_the_same_text_alone_and_among_others(backend: str) -> None:
    model = model_of(backend)
    requests = [
        Request(prompt_of(20 + seed, seed), Sampling(seed=seed, min_p=0.05), max_tokens=9)
        for seed in range(4)
    ]
    with Engine(model, Room(8, PAGE_TOKENS), budget=16) as engine:
        together = generated(engine, *requests)
        apart = [generated(engine, request)[0] for request in requests]
    assert together == apart


def test_steps_of_a_longer_and_longer_sequence_have_few_forms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths, logits_at_home = [], LFM2.logits_at_home

    def noted(model: LFM2, batch: Batch, *others: Any) -> Any:
        widths.append(batch.pages.shape[1])
        return logits_at_home(model, batch, *others)

    monkeypatch.setattr(LFM2, "logits_at_home", noted)
    with engine_of(model_of("reference"), 5) as engine:
        generated(engine, Request(prompt_of(1), GREEDY, max_tokens=4 * PAGE_TOKENS + 2))
    assert [len(list(same)) for _, same in groupby(widths)] == [
        PAGE_TOKENS, PAGE_TOKENS, 2 * PAGE_TOKENS, 2,
    ]  # fmt: skip
    assert sorted(set(widths)) == [1, 2, 4, 8]


def test_a_stop_id_ends_a_sequence_and_is_not_drawn_before_the_least_length() -> None:
    drawn = Sampling(seed=1)
    with engine_of(model_of(), 2) as engine:
        (free,) = generated(engine, Request(prompt_of(5), drawn, max_tokens=6))
        assert len(set(free[:3])) == 3
        stopped = engine.add(Request(prompt_of(5), drawn, stop_ids=[free[2]]))
        events = run(engine)
        assert tokens_of(events, stopped) == free[:3]
        assert ends_of(events) == {(stopped, 0): STOP}
        late = Request(prompt_of(5), drawn, stop_ids=[free[2]], min_tokens=4, max_tokens=4)
        (tokens,) = generated(engine, late)
        assert tokens[:2] == free[:2]
        assert free[2] not in tokens[:3]
        assert len(tokens) == 4


def test_without_a_number_of_tokens_a_sequence_goes_on_to_the_end_of_the_context() -> None:
    with engine_of(model_of(), 2) as engine:
        (tokens,) = generated(engine, Request(prompt_of(100), GREEDY))
        assert len(tokens) == 2 * PAGE_TOKENS - 100


def test_choices_share_the_prompt_and_differ() -> None:
    model = model_of()
    request = Request(prompt_of(100), Sampling(seed=3), n=3, max_tokens=5)
    with engine_of(model, 4, budget=512) as engine:  # 6 are needed without sharing
        id = engine.add(request)
        engine.step()
        engine.step()
        assert len(engine._scheduler._running) == 3
        seeds = [one.seed for one in engine._live[id]]
        events = run(engine)
    assert seeds[0] == 3
    assert len(set(seeds)) == 3
    assert ends_of(events) == {(id, choice): LENGTH for choice in range(3)}


def test_the_next_turn_of_a_chat_computes_only_what_is_new() -> None:
    """That is, from the beginning of the page in which the last turn ended."""
    model = model_of()
    with engine_of(model, 4) as engine:
        (answer,) = generated(engine, Request(prompt_of(70), max_tokens=70))
        request = Request([*prompt_of(70), *answer, 5, 6, 7], GREEDY, max_tokens=3)
        id = engine.add(request)
        (chunk,) = engine._scheduler.plan()
        assert chunk.tokens == 143 - 128
        tokens = tokens_of(run(engine), id)
    ids = [*request.ids.tolist(), *tokens]
    assert tokens == alone(model, request, 0, ids, 143)


def test_forks_differ_from_their_origin_and_from_each_other() -> None:
    with engine_of(model_of(), 4) as engine:
        first = engine.add(Request(prompt_of(3), n=2))
        forks = [engine.fork(first), engine.fork(first), engine.fork(first, 1)]
        forks.append(engine.fork(forks[0]))
        live = [one for id in (first, *forks) for one in engine._live[id]]
        assert len({one.seed for one in live}) == len(live)


def test_a_cancelled_request_ends_at_once_and_frees_its_pages() -> None:
    with engine_of(model_of(), 3) as engine:
        waiting = engine.add(Request(prompt_of(70)))
        engine.step()
        id = engine.add(Request(prompt_of(70), n=2))
        for _ in range(3):
            engine.cancel(waiting)
        assert engine._scheduler.pages.free == 3
        assert ends_of(engine.step()) == {(waiting, 0): CANCELLED}
        engine.cancel(id)
        assert engine._scheduler.pages.free == 3
        assert ends_of(engine.step()) == {(id, 0): CANCELLED, (id, 1): CANCELLED}
        assert not engine.is_busy
        engine.cancel(id)
        assert engine.step() == []


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_cancelling_one_choice_changes_no_other(steps: int, choice: int) -> None:
    request = Request(prompt_of(70), Sampling(seed=1), max_tokens=6, n=3)
    with engine_of(model_of(), 6, budget=64) as engine:
        undisturbed_id = engine.add(request)
        undisturbed = run(engine)
        id = engine.add(request)
        events = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(id, choice)
        engine.cancel(id, choice)
        events += run(engine)
        assert engine._scheduler.pages.free == 6
    assert ends_of(events)[id, choice] == CANCELLED
    for other in {0, 1, 2} - {choice}:
        assert tokens_of(events, id, other) == tokens_of(undisturbed, undisturbed_id, other)
        assert len(tokens_of(events, id, other)) == 6


def test_the_youngest_is_put_back_where_pages_run_out() -> None:
    model, requests = model_of(), [Request(prompt_of(60, s), max_tokens=30) for s in (1, 2, 3)]
    with engine_of(model, 3) as engine:
        apart = [generated(engine, request)[0] for request in requests]
        ids = [engine.add(request) for request in requests]
        counts, events = [], []
        while engine.is_busy:
            events += engine.step()
            counts.append(len(engine._scheduler._running))
    assert counts[0] == 3
    assert sorted(set(counts)) == [0, 1, 3]  # all need a second page at the same time
    assert [tokens_of(events, id) for id in ids] == apart
    ended = [event.id for event in events if event.end]
    assert ended == ids  # the oldest first


class Failing:
    """A model whose forwards raise, or give NaN, for sequences with a certain token."""

    def __init__(self, model: LFM2, error: BaseException | None = None) -> None:
        self._model = model
        self.error = error
        self.is_on = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def logits_at_home(self, batch: Any, *others: Any) -> Iterator[Any]:
        is_bad = self.is_on and (batch.token_ids == 49).any()
        with self._model.logits_at_home(batch, *others) as there:
            if is_bad and self.error is not None:
                raise self.error
            logits = self._model.home.to_host(there).copy()
            if is_bad:
                sequences = np.searchsorted(batch.cu_seqlens, batch.logits_rows, side="right") - 1
                for row, sequence in enumerate(sequences):
                    ids = batch.token_ids[slice(*batch.cu_seqlens[sequence : sequence + 2])]
                    logits[row] = np.nan if 49 in ids else logits[row]
            yield self._model.home.from_host(logits)


def test_nan_ends_that_request_alone_and_names_the_position() -> None:
    good, bad = Request([1, 2, 3], GREEDY, max_tokens=3), Request([4, 49], GREEDY, n=2)
    model: Any = Failing(model_of())
    with engine_of(model, 3) as engine:
        ids = [engine.add(good), engine.add(bad)]
        events = run(engine)
        assert len(tokens_of(events, ids[0])) == 3
        assert ends_of(events) == {(0, 0): LENGTH, (1, 0): FAILED, (1, 1): FAILED}
        error = next(event.error for event in events if event.end == FAILED)
        assert isinstance(error, Lfm2kitError)
        assert "at position 2" in str(error)
        assert engine._scheduler.pages.free == 3


@pytest.mark.parametrize("error", [None, OSError("no device")])
def test_nothing_is_found_that_was_computed_before_a_failure(error: Exception | None) -> None:
    model: Any = Failing(model_of(), error)
    request = Request([*[1] * 70, 49], max_tokens=2)
    with engine_of(model, 3, budget=70) as engine:
        engine.add(request)
        assert ends_of(run(engine)) == {(0, 0): FAILED}
        model.is_on = False
        again = engine.add(request)
        engine.step()
        assert engine._live[again][0].computed == 70  # with the first page, it would be all 71


def test_a_forward_that_raises_ends_the_requests_of_its_step() -> None:
    model: Any = Failing(model_of(), OSError("no device"))
    with engine_of(model, 4, budget=70) as engine:
        first = engine.add(Request([1] * 70, max_tokens=2))
        assert [event.end for event in engine.step()] == [None]
        failing = engine.add(Request([49] * 70, n=2))
        behind = engine.add(Request([2] * 70, max_tokens=2))
        failed = engine.step()
        assert ends_of(failed) == dict.fromkeys([(first, 0), (failing, 0), (failing, 1)], FAILED)
        assert all(isinstance(event.error, OSError) for event in failed)
        assert engine._scheduler.pages.free == 4
        assert ends_of(run(engine)) == {(behind, 0): LENGTH}


def test_pages_of_a_forward_that_raised_are_used_again() -> None:
    """What it wrote is lost, and nobody finds it."""
    model: Any = Failing(model_of(), OSError("no device"))
    request = Request([*[1] * 70, 49, *[2] * 70], GREEDY, max_tokens=3)
    with engine_of(model, 3, budget=70) as engine:
        engine.add(request)
        assert ends_of(run(engine)) == {(0, 0): FAILED}
        model.is_on = False
        (tokens,) = generated(engine, request)
    ids = [*request.ids.tolist(), *tokens]
    assert tokens == alone(model_of(), request, 0, ids, len(request.ids))


def test_an_interrupted_step_can_be_made_again() -> None:
    model: Any = Failing(model_of(), KeyboardInterrupt())
    request = Request([*[1] * 70, 49], Sampling(seed=5), max_tokens=4)
    with engine_of(model, 3, budget=40) as engine:
        id = engine.add(request)
        assert engine.step() == []
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert engine._scheduler.pages.free == 3
        model.is_on = False
        tokens = tokens_of(run(engine), id)
    ids = [*request.ids.tolist(), *tokens]
    assert tokens == alone(model_of(), request, 5, ids, len(request.ids))
    assert len(tokens) == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Request([]), "the prompt is empty"),
        (lambda: Request([1.5]), "prompt are not integers"),
        (lambda: Request([[1]]), "one row of token ids"),
        (lambda: Request([1], max_tokens=0), "max_tokens is 0; expected a whole number, 1 or more"),
        (lambda: Request([1], max_tokens=2, min_tokens=3), "min_tokens is 3; .* 0 to 2"),
        (lambda: Request([1], n=0), "n is 0"),
        (lambda: Request([1], n=True), "n is True"),
        (lambda: Request([1], logprobs=21), "logprobs is 21; .* 0 to 20"),
        (lambda: Request([1], stop_ids=["x"]), "stop_ids are not integers"),
        (lambda: Request([1], stop_ids=2), "stop_ids has shape"),  # type: ignore[arg-type]
    ],
)
def test_a_request_out_of_range_is_refused(make: Callable[[], Request], said: str) -> None:
    with pytest.raises(Lfm2kitError, match=said):
        make()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request([0, VOCABULARY]), "the prompt: token id 50 lies outside the vocabulary of 50"),
        (Request([-1]), "the prompt: token id -1 lies outside"),
        (Request([1], stop_ids=[50]), "stop_ids: token id 50 lies outside"),
        (Request([1], Sampling(logit_bias={50: 1.0})), "logit_bias"),
        (
            Request([1] * 128),
            r"a prompt of 128 tokens and 1 more do not fit into the 128 tokens that a sequence may "
            r"have \(the engine's 2 pages of 64 tokens, .*\); a prompt may have up to 127",
        ),
        (
            Request([1] * 100, max_tokens=29),
            "a prompt of 100 tokens and 29 more do not fit into .*; max_tokens may be up to 28",
        ),
    ],
)
def test_an_engine_refuses_what_it_cannot_run(request_: Request, said: str) -> None:
    with engine_of(model_of(), 2) as engine:
        with pytest.raises(Lfm2kitError, match=said):
            engine.add(request_)
        assert not engine.is_busy


def test_what_is_no_request_is_one_line() -> None:
    said = "an engine takes a Request; got list"
    with engine_of(model_of(), 2) as engine, pytest.raises(Lfm2kitError, match=said):
        engine.add([1, 2])  # type: ignore[arg-type]
    with pytest.raises(Lfm2kitError, match="sampling is 5; expected a Sampling"):
        Request([1], 5)  # type: ignore[arg-type]


def test_a_prompt_beyond_the_context_of_the_model_is_refused() -> None:
    model = build(small_spec(max_position_embeddings=90))
    with Engine(model, Room(4, PAGE_TOKENS)) as engine:
        engine.add(Request([1] * 80, max_tokens=10))
        said = r"11 more do not fit into the 90 .* \(the model's context\); max_tokens .* up to 10"
        with pytest.raises(Lfm2kitError, match=said):
            engine.add(Request([1] * 80, max_tokens=11))


def test_what_has_ended_cannot_be_forked() -> None:
    with engine_of(model_of(), 2) as engine:
        generated(engine, Request([1], max_tokens=1))
        for id, choice in ((0, 0), (7, 0)):
            with pytest.raises(Lfm2kitError, match=f"choice {choice} of request {id} has ended"):
                engine.fork(id, choice)


def test_a_trimmed_model_is_refused() -> None:
    with pytest.raises(Lfm2kitError, match="a trimmed model has no state"):
        Engine(build(SPEC, rewrites=[TRIM]), Room(2))


def test_a_closed_engine_says_so() -> None:
    with engine_of(model_of(), 2) as engine:
        engine.add(Request([1]))
    assert not engine.is_busy
    for call in (engine.step, lambda: engine.add(Request([1])), lambda: engine.fork(0)):
        with pytest.raises(Lfm2kitError, match="the engine is closed"):
            call()


def test_the_budget_is_one_token_or_more() -> None:
    with pytest.raises(Lfm2kitError, match="budget is 0"):
        Engine(model_of(), Room(2), budget=0)


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    example = [line[4:] for line in page.splitlines() if line.startswith("    ") or not line]
    exec(compile("\n".join(example), "docs/engine.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.count("(0, ") == 8
    assert "'length'" in said
