"""Keys and values in pages of NR tokens, laid out so that both products are the tile's.

    scores [rows, NR] = queries [rows, head_dim] @ page of keys [head_dim, NR]
    heads  [rows, NR] += weights [rows, NR] @ page of values [NR, NR columns of head_dim]

The rows of a tile are neighbouring tokens of one sequence with the query heads that share a key
head.  A page begins at a fixed position of its sequence, so that a result's bits depend neither on
the batch nor on how the sequence came in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit import specs
from lfm2kit.backend import F32, Batch
from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_cpu_simd.elementwise import exp
from lfm2kit_cpu_simd.gemm import Float32, Int64
from lfm2kit_cpu_simd.signatures import FLOAT, IDS, INT, OFFSETS, ROWS, ROWS_OUT, TABLE
from lfm2kit_cpu_simd.tile import ALONE, MR, NR, TABLES, call_tile

TOKENS = NR  # of a page
ROWS_AT_ONCE = 4 * MR  # of queries: their scores stay in the second-level cache

PAGES_READ = types.Array(types.float32, 5, "C", readonly=True)
KEYS_READ = types.Array(types.float32, 4, "C", readonly=True)


@dataclass(frozen=True, slots=True)
class Pages:
    """Room for the keys and values of sequences, each in pages that follow one another."""

    keys: npt.NDArray[np.float32]  # [pages, kv_heads, head_dim, TOKENS]
    values: npt.NDArray[np.float32]  # [pages, kv_heads, ceil(head_dim / NR), TOKENS, NR]
    pages_per_slot: int

    @classmethod
    def of_slots(cls, spec: specs.Attention, slots: int, max_tokens: int) -> Pages:
        pages_per_slot = -(-max_tokens // TOKENS)
        shapes = cls._shapes(spec, slots * pages_per_slot)
        return cls(*(np.empty(s, np.float32) for s in shapes.values()), pages_per_slot)

    @classmethod
    def of_whole_sequences(cls, spec: specs.Attention, cu_seqlens: Any) -> tuple[Pages, Int64]:
        """Pages for one forward, in buffers, and each sequence's first."""
        counts = -(-np.diff(cu_seqlens).astype(np.int64) // TOKENS)
        ends = np.cumsum(counts)
        shapes = cls._shapes(spec, int(counts.sum()))
        keys, values = (BUFFERS.array(role, *shape) for role, shape in shapes.items())
        return cls(keys, values, 0), ends - counts

    @staticmethod
    def nbytes(spec: specs.Attention, slots: int, max_tokens: int) -> int:
        columns = spec.head_dim + -(-spec.head_dim // NR) * NR
        return 4 * slots * -(-max_tokens // TOKENS) * TOKENS * spec.num_key_value_heads * columns

    @staticmethod
    def _shapes(spec: specs.Attention, pages: int) -> dict[str, tuple[int, ...]]:
        heads, size = spec.num_key_value_heads, spec.head_dim
        return {
            "keys": (pages, heads, size, TOKENS),
            "values": (pages, heads, -(-size // NR), TOKENS, NR),
        }

    def first_pages(self, slots: Any) -> Int64:
        first: Int64 = slots.astype(np.int64) * self.pages_per_slot
        return first


def remember(qkv: Float32, batch: Batch, pages: Pages, first_pages: Int64) -> None:
    """Puts the keys and values of all rows into their pages."""
    _remember(qkv, batch.cu_seqlens, batch.positions, first_pages, pages.keys, pages.values)


def attend(
    qkv: Float32, batch: Batch, pages: Pages, first_pages: Int64, spec: specs.Attention
) -> Float32:
    """What each query head makes of the values up to its token: [rows, heads * head_dim]."""
    out = BUFFERS.array("heads", len(qkv), spec.num_attention_heads * spec.head_dim)
    _attend(
        qkv, batch.cu_seqlens, batch.positions, first_pages, pages.keys, pages.values,
        np.float32(spec.head_dim**-0.5), TABLES[F32], out, CREW.size(),
    )  # fmt: skip
    return out


@kernel(
    types.void(
        ROWS, IDS, IDS, OFFSETS, types.float32[:, :, :, ::1], types.float32[:, :, :, :, ::1]
    ),
    parallel=True,
)
def _remember(
    qkv: Any, cu_seqlens: Any, positions: Any, first_pages: Any, keys: Any, values: Any
) -> None:
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    keys_at = qkv.shape[1] - 2 * kv_heads * head_dim
    for t in numba.prange(qkv.shape[0]):
        sequence = np.searchsorted(cu_seqlens, t, side="right") - 1
        page = first_pages[sequence] + positions[t] // TOKENS
        place = positions[t] % TOKENS
        for head in range(kv_heads):
            for d in range(head_dim):
                at = keys_at + head * head_dim + d
                keys[page, head, d, place] = qkv[t, at]
                values[page, head, d // NR, place, d % NR] = qkv[t, at + kv_heads * head_dim]


@numba.njit(inline="always")
def _softmax(scores: Any, row: Any, seen: Any, scale: Any) -> Any:
    """Row `row` of scores [pages, rows, TOKENS] becomes e^(score - most), 0 from `seen` on.

    Returns their sum.
    """
    pages = scores.shape[0]
    most = np.float32(-np.inf)
    for page in range(pages):
        for j in range(min(TOKENS, seen - page * TOKENS)):
            most = max(most, scores[page, row, j])
    total = np.float32(0)
    for page in range(pages):
        for j in range(TOKENS):
            weight = exp((scores[page, row, j] - most) * scale)
            scores[page, row, j] = weight if page * TOKENS + j < seen else np.float32(0)
        for j in range(TOKENS):
            total += scores[page, row, j]
    return total


@numba.njit(inline="always")
def _score(queries: Any, keys: Any, first_page: Any, head: Any, table: Any, scores: Any) -> None:
    """scores [pages, rows, TOKENS] of queries [rows, head_dim] against pages of keys."""
    rows, head_dim = queries.shape
    scores[:] = 0
    for page in range(scores.shape[0]):
        at = keys[first_page + page, head].ctypes.data
        for r in range(0, rows, MR):
            m = min(MR, rows - r)
            call_tile(
                table[ALONE, m], queries[r].ctypes.data, head_dim, at, head_dim,
                scores[page, r].ctypes.data, at, 0, 0,
            )  # fmt: skip


@numba.njit(inline="always")
def _weigh(
    scores: Any, r: Any, m: Any, seen: Any, values: Any, first_page: Any, head: Any, part: Any,
    table: Any, sums: Any,
) -> None:  # fmt: skip
    """sums [m, NR] of values' columns `part`, weighed by rows r to r + m of scores."""
    sums[:] = 0
    for page in range(scores.shape[0]):
        at = values[first_page + page, head, part].ctypes.data
        k = max(0, min(TOKENS, seen - page * TOKENS))
        call_tile(
            table[ALONE, m], scores[page, r].ctypes.data, TOKENS, at, k, sums.ctypes.data, at, 0, 0
        )


@numba.njit(inline="always")
def _is_finite(row: Any) -> Any:
    zero = np.float32(0)
    for x in row:
        zero += x - x
    return zero == 0


@numba.njit(inline="always")
def _attend_rows(
    qkv: Any, begin: Any, end: Any, positions: Any, head: Any, group: Any, keys: Any, values: Any,
    first_page: Any, scale: Any, table: Any, out: Any,
) -> None:  # fmt: skip
    """The query heads that share key head `head`, of rows begin to end of one sequence."""
    head_dim, rows = keys.shape[2], (end - begin) * group
    queries = np.empty((rows, head_dim), np.float32)
    for r in range(rows):
        at = (head * group + r % group) * head_dim
        for d in range(head_dim):
            queries[r, d] = qkv[begin + r // group, at + d]
    seen = positions[end - 1] + 1
    scores = np.empty((-(-seen // TOKENS), rows, TOKENS), np.float32)
    _score(queries, keys, first_page, head, table, scores)
    totals = np.empty(rows, np.float32)
    for r in range(rows):
        totals[r] = _softmax(scores, r, positions[begin + r // group] + 1, scale)
    sums = np.empty((MR, NR), np.float32)
    height = MR
    while True:
        for part in range(values.shape[2]):
            for r in range(0, rows, height):
                m = min(height, rows - r)
                if height == 1:
                    seen = positions[begin + r // group] + 1
                _weigh(scores, r, m, seen, values, first_page, head, part, table, sums)
                for i in range(m):
                    at = (head * group + (r + i) % group) * head_dim + part * NR
                    for j in range(min(NR, head_dim - part * NR)):
                        out[begin + (r + i) // group, at + j] = sums[i, j] / totals[r + i]
        # The last row sees all values.  One that is not finite spoils the rows before it too, by 0
        # times it: then once more, each row with what it sees alone.
        at = head * group * head_dim
        if end - begin == 1 or height == 1 or _is_finite(out[end - 1, at : at + head_dim]):
            break
        height = 1


@kernel(
    types.void(ROWS, IDS, IDS, OFFSETS, KEYS_READ, PAGES_READ, FLOAT, TABLE, ROWS_OUT, INT),
    parallel=True,
    error_model="numpy",
    fastmath={"reassoc"},  # the sum of weights in vector lanes
)
def _attend(
    qkv: Any,
    cu_seqlens: Any,
    positions: Any,
    first_pages: Any,
    keys: Any,
    values: Any,
    scale: Any,
    table: Any,
    out: Any,
    threads: Any,
) -> None:
    """Threads take in turns: a sequence, a key head, and so many tokens with their query heads."""
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    group = out.shape[1] // head_dim // kv_heads
    tokens = max(1, ROWS_AT_ONCE // group)
    for thread in numba.prange(threads):
        task = 0
        for sequence in range(first_pages.shape[0]):
            for head in range(kv_heads):
                for begin in range(cu_seqlens[sequence], cu_seqlens[sequence + 1], tokens):
                    task += 1
                    if task % threads != thread:
                        continue
                    end = min(begin + tokens, cu_seqlens[sequence + 1])
                    _attend_rows(
                        qkv, begin, end, positions, head, group, keys, values,
                        first_pages[sequence], scale, table, out,
                    )  # fmt: skip
