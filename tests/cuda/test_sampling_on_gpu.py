"""Tokens that a real GPU draws: those of NumPy, from vocabularies that clusters share unevenly."""

from __future__ import annotations

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.engine.drawing import NumPySampler, Row
from lfm2kit.engine.sampling import Sampling
from tests.cuda.test_emulated_sampling import NO_IDS, Floats, logits_of, row_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

ROWS = 100


def assert_drawn_as_numpy_does(logits: Floats, rows: list[Row]) -> None:
    from lfm2kit_cuda.memory import memory_of
    from lfm2kit_cuda.sampling import Sampler

    memory = memory_of(0)
    drawn = Sampler(memory).draw(memory.from_host(logits), rows)
    for one, expected, row in zip(drawn, NumPySampler().draw(logits, rows), rows, strict=True):
        assert one == expected, row


@pytest.mark.parametrize("vocab_size", [9, 100, 4095, 4097, 12_345, 65_536, 65_537, 200_001])
def test_any_row_draws_what_numpy_draws(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = np.stack([logits_of(rng, number % 4, vocab_size) for number in range(ROWS)])
    assert_drawn_as_numpy_does(logits, [row_of(rng, vocab_size) for _ in logits])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_equal_tokens_are_cut_where_numpy_cuts_them(top_p: float) -> None:
    logits = np.zeros((ROWS, 5000), np.float32)
    rows = [Row(Sampling(top_p=top_p), 5, position, NO_IDS, NO_IDS) for position in range(ROWS)]
    assert_drawn_as_numpy_does(logits, rows)


def test_logits_that_are_not_finite_are_found_wherever_they_are() -> None:
    logits = np.zeros((ROWS, 8191), np.float32)
    places = np.random.default_rng(4).integers(8191, size=ROWS)
    logits[np.arange(ROWS), places] = np.where(np.arange(ROWS) % 2, np.nan, np.inf)
    rows = [Row(Sampling(temperature=i % 3), 5, 6, NO_IDS, NO_IDS) for i in range(ROWS)]
    assert_drawn_as_numpy_does(logits, rows)
