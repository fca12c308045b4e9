"""When CTAs share the parts of a context, and what a state has room for."""

from __future__ import annotations

import numpy as np
import pytest
from lfm2kit_cuda.parts import (
    LEAST_KEPT,
    MOST_ROWS,
    PART_KEYS,
    ctas_of_row,
    layout,
    parts_of,
    parts_shape,
)

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.engine.sizes import size_for
from lfm2kit.state import Room

SPEC = specs.Attention(2048, 32, 8, 64, 1e6, 1e-5)


def batch_of(lengths: list[int], context: int, page_tokens: int = 128) -> Batch:
    """Return sequences whose last rows are new, with pages of their own."""
    width = -(-context // page_tokens)
    pages = np.arange(len(lengths) * width, dtype=np.int32).reshape(-1, width)
    ids = [np.zeros(n, np.int32) for n in lengths]
    return Batch.of_sequences(ids, starts=[context - n for n in lengths], pages=pages)


@pytest.mark.parametrize(("sequences", "context"), [(1, 127_000), (16, 32_768), (64, 8_192)])
def test_a_state_has_room_for_a_row_of_each_of_its_sequences(sequences: int, context: int) -> None:
    batch = batch_of([1] * sequences, context)
    kept, heads, floats = parts_shape(SPEC, Room.of_sequences(sequences, context))
    assert (heads, floats) == (32, 66)
    assert parts_of(batch, 128, kept) == -(-context // PART_KEYS)


@pytest.mark.parametrize("sequences", [64, 65, 97])
def test_a_table_and_rows_that_are_rounded_up_have_room_too(sequences: int) -> None:
    """As engines do, to the next power of two and the next size."""
    ids, pages = [np.zeros(1, np.int32)] * sequences, np.arange(sequences * 64).reshape(-1, 64)
    batch = Batch.of_sequences(ids, starts=[33 * 128 - 1] * sequences, pages=pages)
    kept, *_ = parts_shape(SPEC, Room.of_sequences(sequences, 33 * 128))
    assert parts_of(batch.padded(size_for(sequences)), 128, kept) == 32


def test_a_long_context_is_shared_beside_short_ones() -> None:
    """The table is as wide as the longest sequence needs, which the room need not hold twice."""
    room = Room.of_sequences(1, 33_000)
    assert parts_of(batch_of([1] * 15, 32_768), 128, parts_shape(SPEC, room)[0]) == 128


def test_prompts_are_not_shared_nor_what_has_no_room() -> None:
    for lengths, context in (([MOST_ROWS + 1], 4096), ([1] * 129, 4096)):
        assert parts_of(batch_of(lengths, context), 128, LEAST_KEPT) == 0
    assert parts_of(batch_of([MOST_ROWS], 4096), 128, LEAST_KEPT) == 16


def test_a_single_part_is_that_of_a_step() -> None:
    """Several rows would each read the same keys again, and without a state there are no parts."""
    assert parts_of(batch_of([1] * 2000, PART_KEYS), 128, LEAST_KEPT) == 1
    assert parts_of(batch_of([1, 2], PART_KEYS), 128, LEAST_KEPT) == 0
    assert parts_of(batch_of([1], 1), 0, LEAST_KEPT) == 0


def test_a_room_without_pages_takes_nothing() -> None:
    assert parts_shape(SPEC, Room(0))[0] == 0


@pytest.mark.parametrize(
    ("rows", "parts", "ctas"), [(1, 128, 50), (1, 2, 2), (16, 128, 4), (64, 32, 1)]
)
def test_ctas_fill_the_device(rows: int, parts: int, ctas: int) -> None:
    assert ctas_of_row(batch_of([1] * rows, 8192), 8, parts, sms=132) == ctas


@pytest.mark.parametrize(
    ("kilobytes", "itemsize", "span"),
    [(64, 2, 2), (64, 4, 1), (99, 2, 2), (163, 2, 4), (227, 2, 8), (227, 4, 4)],
)
def test_every_chip_has_room_for_three_ctas(kilobytes: int, itemsize: int, span: int) -> None:
    whole, parts, tiles = layout(SPEC, itemsize, 1024 * kilobytes)
    assert tiles == span
    assert whole <= 1024 * kilobytes
    assert 3 * (parts + 1024) <= 1024 * (kilobytes + 1)  # of each, 1 KB is reserved


def test_a_head_that_is_too_large_for_three_ctas_has_one() -> None:
    _, parts, tiles = layout(specs.Attention(2048, 16, 2, 256, 1e6, 1e-5), 2, 1024 * 64)
    assert tiles == 1
    assert parts <= 1024 * 64
