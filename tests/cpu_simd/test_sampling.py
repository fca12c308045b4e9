"""The compiled sampler beside the conformance suite, which compares its draws with NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lfm2kit_cpu_simd.random_bits import bits_of_draw
from lfm2kit_cpu_simd.sampling import Sampler

from lfm2kit.engine import random_numbers
from lfm2kit.engine.drawing import Drawn, NumPySampler, Row
from lfm2kit.engine.sampling import Sampling

NO_IDS = np.zeros(0, np.int32)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**24 - 1))
def test_the_bits_of_a_draw_are_those_of_the_core(seed: int, position: int) -> None:
    found = bits_of_draw(np.uint64(seed), np.uint64(position))
    assert found == random_numbers.bits_of_draw(seed, position)


def test_each_row_gets_its_own_ids_biases_and_masks() -> None:
    """Rows that bring none of them, one or several lie between each other."""
    ids = np.arange(40, dtype=np.int32)
    bias, word = {3: 5.0, 7: -1.0}, np.full(2, 2**32 - 3, np.uint32)
    rows = [
        Row(Sampling(logit_bias=bias), 1, 5, ids[:9], ids[9:12]),
        Row(Sampling(repetition_penalty=1.5), 2, 5, ids[20:], ids[:20], word),
        Row(Sampling(temperature=0), 3, 5, ids, ids, forbidden=(1, 2)),
        Row(Sampling(presence_penalty=2.0, logit_bias=bias), 4, 5, ids[:3], NO_IDS, word, (9,)),
        Row(Sampling(frequency_penalty=1.0, top_k=30), 5, 5, ids, np.repeat(ids[30:], 3)),
        Row(Sampling(), 6, 5, NO_IDS, NO_IDS, word[:1]),
        Row(Sampling(repetition_penalty=1.1), 7, 5, ids[:1], NO_IDS, forbidden=(30,)),
    ]
    logits = np.random.default_rng(0).standard_normal((len(rows), 64), dtype=np.float32)
    for shift in range(20):
        moved = [row._replace(position=shift) for row in rows]
        assert Sampler().draw(logits, moved) == NumPySampler().draw(logits, moved)


def test_a_mask_without_words_allows_nothing() -> None:
    row = Row(Sampling(), 1, 5, NO_IDS, NO_IDS, np.zeros(0, np.uint32))
    logits = np.zeros((1, 8), np.float32)
    assert Sampler().draw(logits, [row]) == NumPySampler().draw(logits, [row])


def test_logits_of_every_other_row_are_drawn_from_as_they_are() -> None:
    logits = np.eye(6, dtype=np.float32)[::2]
    rows = [Row(Sampling(temperature=0), 1, 5, NO_IDS, NO_IDS)] * 3
    assert Sampler().draw(logits, rows) == [Drawn(0), Drawn(2), Drawn(4)]


def test_no_rows_draw_nothing() -> None:
    assert Sampler().draw(np.zeros((0, 8), np.float32), []) == []


def test_another_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^2 rows for 1 rows of logits$"):
        Sampler().draw(np.zeros((1, 8), np.float32), [Row(Sampling(), 1, 5, NO_IDS, NO_IDS)] * 2)
