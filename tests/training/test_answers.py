"""Inputs are beginnings of held-out paragraphs."""

from __future__ import annotations

import numpy as np

from training.answers import beginnings
from training.data import HELD_OUT, Part


def test_beginnings_are_the_bos_and_the_first_tokens_of_paragraphs_that_are_long_enough() -> None:
    ids = np.array(
        [*range(10, 16), *range(20, 24), *range(10, 16), *range(30, 35)], dtype=np.uint16
    )
    part = Part(ids, np.array([0, 6, 10, 16], dtype=np.int32), len(ids))
    found = beginnings(dict.fromkeys(HELD_OUT, part), length=4)
    assert found.dtype == np.int32
    assert sorted(found.tolist()) == [[1, 10, 11, 12], [1, 30, 31, 32]]
