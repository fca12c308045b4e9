"""Models, a sampler and judges for tests of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lfm2kit.backend import HOST, Context, Memory
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.engine.constraints import Allowed
from lfm2kit.engine.drawing import Drawn, NotANumber, Row, Sampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.followed import Followed
from lfm2kit.engine.masks import Patience
from lfm2kit.engine.pages import Pages
from lfm2kit.engine.requests import Event, Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import ModelState, Room
from lfm2kit.testing import random_weights
from lfm2kit.testing.tiny_model import build_tiny_model
from tests.core.small import small_spec

Float32 = npt.NDArray[np.float32]

VOCABULARY = 50
PAGE_TOKENS = 64
MOST_STEPS = 10_000
ALL_THE_TIME = Patience(step=3600)  # no mask is ever late
GREEDY = Sampling(temperature=0)
PLUGINS = installed_plugins()
THERE = [name for name, backend in PLUGINS.backends.items() if backend.why_not is None]
# Those whose results depend on nothing else in the batch, and that run on this machine.
ON_HOST = [name for name in ("reference", "cpu_simd") if name in THERE]
BACKENDS = [*ON_HOST, *(pytest.param("cuda", marks=pytest.mark.gpu) for _ in {"cuda"} & {*THERE})]
# All experts are taken: no two results differ by a choice that was within rounding.
SPEC = small_spec(
    layer_types=["conv", "full_attention"], num_hidden_layers=2, num_dense_layers=1,
    num_experts=3, vocab_size=VOCABULARY,
)  # fmt: skip


@cache
def model_of(backend: str = "reference") -> LFM2:
    on_trial = PLUGINS.creator(Context())(backend)
    return build_tiny_model(SPEC, random_weights(SPEC, 0), ReferenceBackend(), on_trial)


class KeyedSampler:
    """A sampler whose random numbers follow from a row's seed and position."""

    def __init__(self, memory: Memory = HOST) -> None:
        self._memory = memory

    def draw(self, logits: Any, rows: Sequence[Row | None]) -> list[Drawn | NotANumber | None]:
        pairs = zip(self._memory.to_host(logits), rows, strict=True)
        return [None if row is None else self._drawn(own, row) for own, row in pairs]

    def _drawn(self, logits: Float32, row: Row) -> Drawn | NotANumber:
        if np.isnan(logits).any():
            return NotANumber(row.position, "its logits are NaN")
        scores = logits.astype(np.float64)
        scores[list(row.forbidden)] = -np.inf
        if row.mask is not None:
            scores[~in_mask(row.mask, len(scores))] = -np.inf
        if row.sampling.temperature:
            keyed = np.random.default_rng([row.seed, row.position])
            scores += keyed.gumbel(size=len(scores))
        return Drawn(int(scores.argmax()))


def in_mask(mask: npt.NDArray[np.uint32], size: int) -> npt.NDArray[np.bool_]:
    """Return which of `size` ids a mask allows."""
    ids = np.arange(size)
    return mask[ids // 32] >> ids % 32 & 1 != 0


def words(allowed: Iterable[int], size: int = VOCABULARY) -> npt.NDArray[np.uint32]:
    """Return the mask that allows these ids."""
    mask = np.zeros(-(-size // 32), np.uint32)
    for token_id in allowed:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return mask


class Thirds:
    """A constraint that allows a third of the ids, other ones after each token."""

    def begin(self) -> ThirdsText:
        return ThirdsText()


class ThirdsText:
    """A text whose next token follows from all tokens that it has."""

    def __init__(self) -> None:
        self._state = 0

    def take(self, token_id: int) -> None:
        assert (token_id + self._state) % 3 == 0 or self._may_end()
        self._state = self._state * 31 % 1009 + token_id

    def allowed(self) -> Allowed:
        ids = [token_id for token_id in range(VOCABULARY) if (token_id + self._state) % 3 == 0]
        return Allowed(words(ids), self._may_end())

    def _may_end(self) -> bool:
        return self._state % 4 == 3


def engine_of(model: LFM2, pages: int, **options: Any) -> Engine:
    """Return an engine with a small room, in whose state, in the host's memory, is only NaN."""
    options = {"patience": ALL_THE_TIME, "sampler": KeyedSampler(model.home)} | options
    engine = Engine(model, Room(pages, PAGE_TOKENS), **options)
    if model.home.name == HOST.name:  # else nothing says when it would be written
        Poison(engine)
    return engine


class Poison(Pages):
    """The books of pages, each of which is filled with NaN when it is taken."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.room)
        self._state = engine._steps._state
        engine._scheduler.pages = self
        for array in arrays_of(self._state):
            array.fill(np.nan)

    def take(self) -> int:
        page = super().take()
        for array in arrays_of(self._state):
            array[page] = np.nan
        return page


def arrays_of(state: ModelState | None) -> list[Any]:
    """Return views of a state's arrays, each [pages, ...]; those of a layer may be a list of them.

    `cpu_simd` has several panels for a page where vectors are short.
    """
    assert state is not None
    pages = state.room.pages
    found = [value for layer in state.layers for value in layer if isinstance(value, np.ndarray)]
    assert found
    assert all(len(array) % pages == 0 for array in found)
    return [array.reshape(pages, len(array) // pages, *array.shape[1:]) for array in found]


def run(engine: Engine) -> list[Event]:
    """Return all events until the engine has nothing to do."""
    events = []
    for _ in range(MOST_STEPS):
        if not engine.is_busy:
            return events
        events += engine.step()
    raise AssertionError(f"not done after {MOST_STEPS} steps")


def tokens_of(events: list[Event], id: int, choice: int = 0) -> list[int]:
    """Return the tokens that these events say of one sequence."""
    mine = [event for event in events if (event.id, event.choice) == (id, choice)]
    return [event.token_id for event in mine if event.token_id is not None]


def generated(engine: Engine, *requests: Request) -> list[list[int]]:
    """Return what each request, of one sequence, gives together with the others."""
    ids = [engine.add(request) for request in requests]
    events = run(engine)
    return [tokens_of(events, id) for id in ids]


def alone(
    model: LFM2,
    request: Request,
    seed: int,
    ids: Sequence[int],
    begin: int,
    sampler: Sampler | None = None,
) -> list[int]:
    """Return the tokens from place `begin` of `ids` on that single forwards choose.

    One forward over the whole sequence gives all of its rows: each choice is the right one after
    the tokens before it.
    """
    places = range(begin, len(ids))
    rows = np.array(places, np.int32) - np.int32(1)
    logits = model.logits(replace(Batch.of_sequences([ids]), logits_rows=rows))
    sampler = sampler or KeyedSampler()
    drawn = sampler.draw(logits, [_row(request, seed, ids, place) for place in places])
    return [one.token_id for one in drawn if isinstance(one, Drawn)]


def _row(request: Request, seed: int, ids: Sequence[int], place: int) -> Row:
    prompt = request.ids
    generated = np.array(ids[len(prompt) : place], np.int32)
    forbidden = tuple(request.stop_ids) if len(generated) < request.min_tokens else ()
    mask = None
    if request.constraint is not None:
        mask = Followed(request, VOCABULARY).next(generated).mask
    return Row(request.sampling, seed, place, prompt, generated, mask, forbidden, request.logprobs)
