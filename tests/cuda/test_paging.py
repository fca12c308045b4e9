"""What states and launches are told of pages."""

from __future__ import annotations

from math import prod

import pytest
from lfm2kit_cuda.paging import most_pages, state_bytes
from lfm2kit_cuda.parts import arrived_shape, parts_shape

from lfm2kit import specs
from lfm2kit.state import Room
from lfm2kit.testing.cases import WIDE_MOE, WIDE_NORM


@pytest.mark.parametrize("page_tokens", [64, 192])
def test_a_chunk_lies_in_no_more_pages_than_are_written(page_tokens: int) -> None:
    for tokens in (0, 1, 2, 63, 64, 65, 66, 129, 192, 193, 194, 500):
        reached = {
            (start + tokens - 1) // page_tokens - start // page_tokens + 1
            for start in range(page_tokens)
            if tokens
        }
        assert most_pages(tokens, page_tokens) == max(reached, default=0)


def test_a_layer_takes_what_its_operator_takes() -> None:
    room, conv = Room(5, 192), specs.ShortConv(128, 4)
    attention = specs.Attention(128, 4, 2, 64, 1e6, 1e-5)
    shared = 4 * (prod(parts_shape(attention, room)) + prod(arrived_shape(attention, room)))
    kept = 2 * 2 * 5 * 192 * 2 * 64
    for operator, expected in ((conv, 4 * 5 * 19 * 128), (attention, kept + shared)):
        layer = specs.Layer(WIDE_NORM, operator, WIDE_NORM, WIDE_MOE)
        assert state_bytes(layer, room, itemsize=2) == expected
        assert state_bytes(operator, room, itemsize=2) == expected
