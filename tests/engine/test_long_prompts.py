"""Long prompts take memory that grows with their length alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.model import LFM2
from lfm2kit.state import Room
from tests.engine.harness import GREEDY, ON_HOST, VOCABULARY, generated, model_of


def peak_of(model: LFM2, tokens: int) -> int:
    """Return the most bytes that are in use at once while a prompt is computed and continued."""
    prompt = np.random.default_rng(0).integers(VOCABULARY, size=tokens)
    tracemalloc.start()
    try:
        with Engine(model, Room.of_sequences(1, tokens + 2), budget=128) as engine:
            (drawn,) = generated(engine, Request(prompt, GREEDY, max_tokens=2))
        assert len(drawn) == 2
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def grows_linearly(model: LFM2, tokens: int) -> bool:
    """Return whether twice as many further tokens take about twice as much further memory."""
    quarter, half, whole = (peak_of(model, tokens // part) for part in (4, 2, 1))
    return whole - half < 3 * (half - quarter)  # 2 if it is linear, 4 if it is quadratic


def test_a_prompt_of_4096_tokens_takes_linear_memory() -> None:
    assert grows_linearly(model_of(), 4096)


@pytest.mark.long
def test_a_prompt_of_32768_tokens_takes_linear_memory() -> None:
    assert grows_linearly(model_of(ON_HOST[-1]), 32768)
