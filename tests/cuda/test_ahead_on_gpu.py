"""An engine on a real GPU whose steps begin before the tokens of the last one are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.engine.drawing import Drawing, Row
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.engine.sampling import Sampling
from lfm2kit.model import LFM2
from tests.engine import test_ahead
from tests.engine.harness import VOCABULARY, engine_of, generated
from tests.random_model import build_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

PRECISIONS = ("fp32", "bf16")


@cache
def model_of(precision: str) -> LFM2:
    return build_random("cuda", precision=precision)


class Noted:
    """The GPU's sampler; it notes how many drawings have begun when another one ends."""

    def __init__(self, model: LFM2) -> None:
        backend: Any = model.backend
        self._sampler = backend.sampler()
        self.begun = 0
        self.ended = 0
        self.ahead = 0  # drawings that began before the one before had ended

    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        return self._sampler.draw(logits, rows)

    def begin(self, logits: Any, rows: Sequence[Row | None], newest: Any = None) -> NotedDrawing:
        self.ahead += self.begun > self.ended
        self.begun += 1
        return NotedDrawing(self, self._sampler.begin(logits, rows, newest))


class NotedDrawing:
    def __init__(self, sampler: Noted, drawing: Drawing) -> None:
        self._sampler = sampler
        self._drawing = drawing
        self.token_ids = drawing.token_ids

    def end(self) -> Any:
        self._sampler.ended += 1
        return self._drawing.end()


class Reads:
    """A sampler that does not draw ahead."""

    def __init__(self, model: LFM2) -> None:
        self.draw = Noted(model).draw


class Programs(test_ahead.Programs):
    """The programs of another device, with the GPU's sampler."""

    def new_engine(self, pages: int, budget: int) -> Engine:
        self.model = model_of(self.backend)
        self.noted = Noted(self.model)
        return engine_of(self.model, pages, budget=max(budget, 16), sampler=self.noted)

    def count(self) -> int:
        return self.noted.ahead


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sequences_have_the_tokens_that_they_have_alone(precision: str) -> None:
    assert sum(test_ahead.run_programs(30, precision, Programs)) > 500


def request_of(seed: int) -> Request:
    rng = np.random.default_rng(seed)
    sampling = Sampling(
        temperature=float(rng.choice([0, 0.3, 1])), seed=seed, min_p=float(rng.choice([0, 0.15])),
        top_k=int(rng.choice([0, 5])), repetition_penalty=float(rng.choice([1, 1.3])),
        presence_penalty=float(rng.choice([0, 0.7])), frequency_penalty=float(rng.choice([0, 0.9])),
    )  # fmt: skip
    return Request(
        rng.integers(VOCABULARY, size=int(rng.integers(1, 90))), sampling,
        max_tokens=int(rng.integers(1, 90)), min_tokens=int(rng.integers(2)), stop_ids=(1, 2),
    )  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sequences", [1, 2, 16])
def test_tokens_are_those_of_steps_that_are_read_one_by_one(precision: str, sequences: int) -> None:
    model = model_of(precision)
    for first in range(0, 4 * sequences, sequences):
        requests = [request_of(seed) for seed in range(first, first + sequences)]
        noted = Noted(model)
        with engine_of(model, 3 * sequences, sampler=Reads(model)) as engine:
            expected = generated(engine, *requests)
        with engine_of(model, 3 * sequences, sampler=noted) as engine:
            assert generated(engine, *requests) == expected
    assert noted.ahead > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_most_steps_of_long_texts_begin_ahead(precision: str) -> None:
    model = model_of(precision)
    noted = Noted(model)
    requests = [Request([seed, 3, 4], Sampling(seed=seed), max_tokens=100) for seed in range(3)]
    with engine_of(model, 6, sampler=noted) as engine:
        generated(engine, *requests)
    assert noted.begun == 100
    assert noted.ahead >= 100 - 2 * 3 - 1  # two steps of each form, and the last one
