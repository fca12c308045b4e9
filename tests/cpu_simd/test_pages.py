"""The operators over pages that hold NaN wherever nothing was written, at the edges of pages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_cpu_simd.blocks.short_conv import SHORT, _place
from lfm2kit_cpu_simd.machine import NR

from lfm2kit import specs
from lfm2kit.backend import Batch, Block, Context, Room
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import STEP_BACK
from lfm2kit.testing.random_weights import random_weights

Float32 = npt.NDArray[np.float32]
Operator = specs.ShortConv | specs.Attention

OPERATORS: tuple[Operator, ...] = (
    specs.Attention(20, 3, 1, 16, 1e6, 1e-2),
    specs.Attention(24, 4, 2, NR + 6, 1e4, 1e-5),  # values in two panels
    specs.ShortConv(13, 3, bias=True),
    specs.ShortConv(9, 1),
    specs.ShortConv(5, 70),  # its window is longer than a page of 64 tokens
)
LENGTHS = (63, 64, 65, 127, 128, 129)
PAGE_TOKENS = (64, 128)


def built(spec: Operator) -> Block:
    return CpuSimdBackend(Context()).build(spec, random_weights(spec))


def random_rows(spec: Operator, count: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((count, spec.hidden_size), np.float32)


def one_shot(block: Block, x: Float32) -> Float32:
    result: Float32 = block(x, Batch.of_sequences([np.zeros(len(x), np.int32)]), None)
    return result


def poisoned(block: Any, room: Room) -> Any:
    """Return a state of NaN."""
    state = block.new_state(room)
    for array in arrays_of(state):
        array.fill(np.nan)
    return state


def arrays_of(state: Any) -> list[Float32]:
    return [value for value in state if isinstance(value, np.ndarray)]


class Fed:
    """The sequences of one state, with pages in an order of their own."""

    def __init__(self, block: Block, sequences: int, tokens: int, page_tokens: int) -> None:
        room = Room.of_sequences(sequences + 1, tokens, page_tokens)  # with pages of nobody
        order = np.random.default_rng(1).permutation(room.pages).astype(np.int32)
        self.pages = order.reshape(sequences + 1, -1)[:sequences]
        self.block, self.state = block, poisoned(block, room)
        self.starts = [0] * sequences

    def feed(self, *chunks: Float32) -> Float32:
        """Return the result of one call with the next rows of each sequence."""
        ids = [np.zeros(len(chunk), np.int32) for chunk in chunks]
        batch = Batch.of_sequences(ids, starts=self.starts, pages=self.pages)
        self.starts = [start + len(chunk) for start, chunk in zip(self.starts, chunks, strict=True)]
        result: Float32 = self.block(np.concatenate(chunks), batch, self.state)
        return result


@pytest.mark.parametrize("spec", OPERATORS, ids=str)
def test_one_forward_is_right_at_the_edges_of_panels(spec: Operator, threads: int) -> None:
    block = built(spec)
    reference = ReferenceBackend().build(spec, random_weights(spec))
    for length in LENGTHS:
        x = random_rows(spec, length)
        want = one_shot(reference, x)
        scale = float(np.abs(want).max())
        np.testing.assert_allclose(one_shot(block, x), want, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("spec", OPERATORS, ids=str)
def test_two_chunks_have_the_bits_of_one_wherever_they_meet(spec: Operator, threads: int) -> None:
    block = built(spec)
    for length in LENGTHS:
        x = random_rows(spec, length)
        want = one_shot(block, x)
        for page_tokens in PAGE_TOKENS:
            for cut in {1, 16, 17, 63, 64, 65, 127, 128, *(length - i for i in (17, 16, 1, 0))}:
                if cut > length:
                    continue
                fed = Fed(block, 1, length, page_tokens)
                parts = [fed.feed(x[a:b]) for a, b in pairwise((0, cut, length)) if a < b]
                np.testing.assert_array_equal(np.concatenate(parts), want)


@pytest.mark.parametrize("spec", OPERATORS, ids=str)
def test_sequences_of_one_batch_each_read_their_own_pages(spec: Operator, threads: int) -> None:
    block = built(spec)
    x = [random_rows(spec, length, seed=length) for length in LENGTHS]
    fed = Fed(block, len(x), max(LENGTHS), 64)
    first = fed.feed(*(rows[:-3] for rows in x))
    steps = [fed.feed(*(rows[-i : len(rows) - i + 1] for rows in x)) for i in (3, 2, 1)]
    ends = np.cumsum([0, *(len(rows) - 3 for rows in x)])
    for i, rows in enumerate(x):
        parts = [first[ends[i] : ends[i + 1]], *(step[i : i + 1] for step in steps)]
        np.testing.assert_array_equal(np.concatenate(parts), one_shot(block, rows))


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
@pytest.mark.parametrize("spec", OPERATORS, ids=str)
def test_a_page_holds_what_its_tokens_left_and_nothing_else(
    spec: Operator, page_tokens: int, threads: int
) -> None:
    for length in LENGTHS:
        fed = Fed(built(spec), 1, length, page_tokens)
        fed.feed(random_rows(spec, length))
        for array in arrays_of(fed.state):
            is_written = ~np.isnan(array)
            np.testing.assert_array_equal(
                is_written, written(spec, array, fed.pages[0], page_tokens, length)
            )


def written(
    spec: Operator, array: Float32, pages: npt.NDArray[np.int32], page_tokens: int, length: int
) -> npt.NDArray[np.bool_]:
    """Return the places of an array of a state that `length` tokens write."""
    is_written = np.zeros(array.shape, bool)
    for position in range(length):
        page, token = pages[position // page_tokens], position % page_tokens
        if isinstance(spec, specs.ShortConv):
            last = min(length, (position // page_tokens + 1) * page_tokens)
            if position >= last - array.shape[1]:
                is_written[page, token % array.shape[1]] = True
            continue
        panel, place = page * (page_tokens // NR) + token // NR, token % NR
        if array.ndim == 4:
            is_written[panel, :, :, place] = True
        else:
            parts = is_written[panel, :, :, place]  # [kv_heads, parts, NR]
            flat = np.zeros((len(parts), parts[0].size), bool)
            flat[:, : spec.head_dim] = True
            is_written[panel, :, :, place] = flat.reshape(parts.shape)
    return is_written


def test_a_window_has_room_for_the_rows_that_a_sequence_may_go_back() -> None:
    state = built(specs.ShortConv(4, 3)).new_state(Room(2))  # type: ignore[attr-defined]
    assert state.rows.shape == (2, 2 + STEP_BACK, 4)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 70])
def test_a_short_chunk_replaces_no_row_that_it_reads(kernel_size: int) -> None:
    """So that its rows may be kept while others are still computed."""
    pages, window = np.arange(8, dtype=np.int32), kernel_size - 1 + STEP_BACK
    for start in range(1, 4 * 64):
        before = range(max(0, start - kernel_size + 1), start)
        read = {_place(p, pages, 64, window) for p in before}
        kept = {_place(p, pages, 64, window) for p in range(start, start + SHORT)}
        assert len(kept) == SHORT
        assert not read & kept


def test_a_long_context_is_summed_in_parts() -> None:
    """In one chain, 512 equal pages would round the same way: an error of 5e-5."""
    spec = specs.Attention(24, 4, 2, 6, 5000.0, 1e-5)
    beginning, x = random_rows(spec, 64), random_rows(spec, 5, seed=1)
    results = []
    for backend in (CpuSimdBackend(Context()), ReferenceBackend()):
        block: Any = backend.build(spec, random_weights(spec))
        state = block.new_state(Room(2, 64))
        block(beginning, Batch.of_sequences([range(64)], pages=[[0]]), state)
        table = [[0] * 512 + [1]]
        results.append(block(x, Batch.of_sequences([range(5)], starts=[32768], pages=table), state))
    got, want = results
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())
