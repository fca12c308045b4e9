"""Keys and values in panels of NR tokens, laid out so that both products are the tile's.

    scores [rows, NR] = queries [rows, head_dim] @ panel of keys [head_dim, NR]
    heads  [rows, NR] += weights [rows, NR] @ panel of values [NR, NR columns of head_dim]

The rows of a tile are neighbouring tokens of one sequence with the query heads that share a key
head.  A page of a state holds page_tokens / NR panels, one after the other.  A panel begins at a
fixed position of its sequence, so that a result's bits depend neither on the batch nor on how the
sequence came in, nor on the size of pages.

In the kernels, row r of a task's scores of panel i is row i * rows + r of `scores`.  Each thread
allocates its arrays once: for a token in a short context that takes longer than the arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit import specs
from lfm2kit.backend import F32, Batch, Room
from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.claiming import claimed
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_cpu_simd.elementwise import exp
from lfm2kit_cpu_simd.gemm import Float32
from lfm2kit_cpu_simd.machine import NR
from lfm2kit_cpu_simd.signatures import FLOAT, IDS, IDS_2D, INT, ROWS, ROWS_OUT, TABLE
from lfm2kit_cpu_simd.tile import ALONE, CACHE_LINE, MR, TABLES, UNROLL, call_tile_of_one_chain

ROWS_AT_ONCE = 4 * MR  # of queries: their scores stay in the second-level cache
# Panels of 1024 tokens.  Sums of sums: one chain over a long context would round worse.
SUMMED = 1024 // NR
# A head's panels do not lie beside each other, so each is asked for AHEAD panels before its turn:
# as many cache lines with every UNROLL steps of k as a panel of float32 has.
AHEAD, LINES = 4, UNROLL * 4 * NR // CACHE_LINE
PART = 4 * NR * NR  # bytes of a panel's values in NR columns

KEYS, VALUES = types.float32[:, :, :, ::1], types.float32[:, :, :, :, ::1]
KEYS_READ = types.Array(types.float32, 4, "C", readonly=True)
VALUES_READ = types.Array(types.float32, 5, "C", readonly=True)

Int32 = npt.NDArray[np.int32]


class State(NamedTuple):
    """The keys and values of pages, which have `panels_per_page` panels each."""

    keys: Float32  # [panels, kv_heads, head_dim, NR]
    values: Float32  # [panels, kv_heads, ceil(head_dim / NR), NR, NR]
    panels_per_page: int

    @classmethod
    def of_room(cls, spec: specs.Attention, room: Room) -> State:
        panels_per_page = room.page_tokens // NR
        shapes = _shapes(spec, room.pages * panels_per_page)
        keys, values = (np.empty(shape, np.float32) for shape in shapes.values())
        return cls(keys, values, panels_per_page)

    def first_panels(self, pages: Int32) -> Int32:
        """Return the panel that each page begins with; a negative number for no page."""
        return pages * np.int32(self.panels_per_page)


def whole_sequences(spec: specs.Attention, cu_seqlens: Int32) -> tuple[State, Int32]:
    """Return a state in buffers for one forward, and the panel that each sequence begins with.

    A sequence is one page there, of as many panels as it needs: int32 [sequences, 1].
    """
    counts = -(-np.diff(cu_seqlens) // NR)
    ends = np.cumsum(counts, dtype=np.int32)
    panels = int(counts.sum())
    shapes = _shapes(spec, panels)
    keys, values = (BUFFERS.array(role, *shape) for role, shape in shapes.items())
    return State(keys, values, panels), (ends - counts)[:, None]


def _shapes(spec: specs.Attention, panels: int) -> dict[str, tuple[int, ...]]:
    heads, size = spec.num_key_value_heads, spec.head_dim
    return {
        "keys": (panels, heads, size, NR),
        "values": (panels, heads, -(-size // NR), NR, NR),
    }


def remember(qkv: Float32, batch: Batch, state: State, first_panels: Int32) -> None:
    """Put the keys and values of all rows into their panels."""
    _remember(
        qkv, batch.cu_seqlens, batch.positions, first_panels, state.panels_per_page, state.keys,
        state.values,
    )  # fmt: skip


def attend(
    qkv: Float32, batch: Batch, state: State, first_panels: Int32, spec: specs.Attention
) -> Float32:
    """Return each query head's mean of the values up to its token: [rows, heads * head_dim].

    The result lies in a buffer.
    """
    out = BUFFERS.array("heads", len(qkv), spec.num_attention_heads * spec.head_dim)
    _attend(
        qkv, batch.cu_seqlens, batch.positions, first_panels, state.panels_per_page, state.keys,
        state.values, np.float32(spec.head_dim**-0.5), TABLES[F32], out, CREW.size(),
    )  # fmt: skip
    return out


@numba.njit(inline="always")
def _panel(first_panels: Any, panels_per_page: Any, i: Any) -> Any:
    """Return panel i of a sequence whose pages begin with the panels `first_panels`."""
    return first_panels[i // panels_per_page] + i % panels_per_page


@kernel(
    types.void(ROWS, IDS, IDS, IDS_2D, INT, KEYS, VALUES),
    parallel=True,
    error_model="numpy",
)
def _remember(
    qkv: Any,
    cu_seqlens: Any,
    positions: Any,
    first_panels: Any,
    panels_per_page: Any,
    keys: Any,
    values: Any,
) -> None:
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    keys_at = qkv.shape[1] - 2 * kv_heads * head_dim
    for t in numba.prange(qkv.shape[0]):
        sequence = np.searchsorted(cu_seqlens, t, side="right") - 1
        panel = _panel(first_panels[sequence], panels_per_page, positions[t] // NR)
        place = positions[t] % NR
        for head in range(kv_heads):
            for d in range(head_dim):
                at = keys_at + head * head_dim + d
                keys[panel, head, d, place] = qkv[t, at]
                values[panel, head, d // NR, place, d % NR] = qkv[t, at + kv_heads * head_dim]


@numba.njit(inline="always")
def _most(scores: Any, row: Any, rows: Any, seen: Any, lanes: Any) -> Any:
    """Return the largest of the first `seen` scores of row `row`, first lane by lane."""
    lanes[:] = -np.inf
    for i in range(seen // NR):
        for j in range(NR):
            lanes[j] = max(lanes[j], scores[i * rows + row, j])
    for j in range(seen % NR):
        lanes[j] = max(lanes[j], scores[seen // NR * rows + row, j])
    most = np.float32(-np.inf)
    for j in range(NR):
        most = max(most, lanes[j])
    return most


@numba.njit(inline="always")
def _softmax(
    scores: Any, row: Any, rows: Any, count: Any, seen: Any, scale: Any, lanes: Any
) -> Any:
    """Make e^(score - most) of row `row` of the scores of `count` panels, and 0 from `seen` on.

    Return their sum.
    """
    most = _most(scores, row, rows, seen, lanes)
    total, part = np.float32(0), np.float32(0)
    for i in range(count):
        if i % SUMMED == 0:
            total, part = total + part, np.float32(0)
        for j in range(NR):
            weight = exp((scores[i * rows + row, j] - most) * scale)
            scores[i * rows + row, j] = weight if i * NR + j < seen else np.float32(0)
        for j in range(NR):
            part += scores[i * rows + row, j]
    return total + part


@numba.njit(inline="always")
def _score(
    queries: Any, rows: Any, keys: Any, panels: Any, count: Any, head: Any, table: Any, scores: Any
) -> None:
    """Compute the scores of `rows` queries [rows, head_dim] and `count` panels of keys."""
    head_dim = queries.shape[1]
    scores[: count * rows] = 0
    for i in range(count):
        at = keys[panels[i], head].ctypes.data
        ahead = keys[panels[min(i + AHEAD, count - 1)], head].ctypes.data
        for r in range(0, rows, MR):
            m = min(MR, rows - r)
            lines = LINES if r == 0 and i + AHEAD < count else 0
            call_tile_of_one_chain(
                table[ALONE, m], queries[r].ctypes.data, head_dim, at, head_dim,
                scores[i * rows + r].ctypes.data, lines, ahead,
            )  # fmt: skip


@numba.njit(inline="always")
def _move(sums: Any, others: Any) -> None:
    """Add sums [parts, MR, NR] to others, and make them zero."""
    for part in range(sums.shape[0]):
        for i in range(MR):
            for j in range(NR):
                others[part, i, j] += sums[part, i, j]
                sums[part, i, j] = 0


@numba.njit(inline="always")
def _weigh(
    scores: Any, r: Any, m: Any, rows: Any, seen: Any, values: Any, panels: Any, count: Any,
    head: Any, table: Any, sums: Any, earlier: Any,
) -> None:  # fmt: skip
    """Sum the values, weighed by rows r to r + m of scores, into sums [parts, m, NR].

    `earlier` is zero before and after.
    """
    sums[:] = 0
    for i in range(count):
        if i and i % SUMMED == 0:
            _move(sums, earlier)
        at = values[panels[i], head].ctypes.data
        ahead = values[panels[min(i + AHEAD, count - 1)], head].ctypes.data
        lines = LINES if r == 0 and i + AHEAD < count else 0
        k = max(0, min(NR, seen - i * NR))
        for part in range(sums.shape[0]):
            call_tile_of_one_chain(
                table[ALONE, m], scores[i * rows + r].ctypes.data, NR, at + part * PART, k,
                sums[part].ctypes.data, lines, ahead + part * PART,
            )  # fmt: skip
    if count > SUMMED:
        _move(earlier, sums)


@numba.njit(inline="always")
def _is_finite(row: Any) -> Any:
    zero = np.float32(0)
    for x in row:
        zero += x - x
    return zero == 0


@numba.njit(inline="always")
def _attend_rows(
    qkv: Any, begin: Any, end: Any, positions: Any, head: Any, group: Any, keys: Any, values: Any,
    panels: Any, scale: Any, table: Any, queries: Any, scores: Any, lanes: Any, totals: Any,
    sums: Any, earlier: Any, out: Any,
) -> None:  # fmt: skip
    """Compute the query heads that share key head `head`, of rows begin to end of a sequence."""
    head_dim, rows = keys.shape[2], (end - begin) * group
    for r in range(rows):
        at = (head * group + r % group) * head_dim
        for d in range(head_dim):
            queries[r, d] = qkv[begin + r // group, at + d]
    seen = positions[end - 1] + 1
    count = -(-seen // NR)
    _score(queries, rows, keys, panels, count, head, table, scores)
    for r in range(rows):
        seen_by_row = positions[begin + r // group] + 1
        totals[r] = _softmax(scores, r, rows, count, seen_by_row, scale, lanes)
    height = MR
    while True:
        for r in range(0, rows, height):
            m = min(height, rows - r)
            if height == 1:
                seen = positions[begin + r // group] + 1
            _weigh(scores, r, m, rows, seen, values, panels, count, head, table, sums, earlier)
            for part in range(sums.shape[0]):
                for i in range(m):
                    at = (head * group + (r + i) % group) * head_dim + part * NR
                    for j in range(min(NR, head_dim - part * NR)):
                        out[begin + (r + i) // group, at + j] = sums[part, i, j] / totals[r + i]
        # The last row sees all values.  One that is not finite spoils the rows before it too, by 0
        # times it.  Then all is done again, row by row, with only the values that a row sees.
        at = head * group * head_dim
        if end - begin == 1 or height == 1 or _is_finite(out[end - 1, at : at + head_dim]):
            break
        height = 1


@kernel(
    types.void(ROWS, IDS, IDS, IDS_2D, INT, KEYS_READ, VALUES_READ, FLOAT, TABLE, ROWS_OUT, INT),
    parallel=True,
    error_model="numpy",
    fastmath={"reassoc"},  # the sum of weights in vector lanes
)
def _attend(
    qkv: Any,
    cu_seqlens: Any,
    positions: Any,
    first_panels: Any,
    panels_per_page: Any,
    keys: Any,
    values: Any,
    scale: Any,
    table: Any,
    out: Any,
    threads: Any,
) -> None:
    """Compute all heads.  A task is a key head's query heads, of some tokens of a sequence.

    Threads take the tasks in turn: cores that others share, or that wake late, do fewer.
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    group = out.shape[1] // head_dim // kv_heads
    tokens = max(1, ROWS_AT_ONCE // group)
    most = 0  # scores of a task
    for sequence in range(first_panels.shape[0]):
        last = cu_seqlens[sequence + 1] - 1
        rows = min(tokens, last + 1 - cu_seqlens[sequence]) * group
        most = max(most, rows * (positions[last] // NR + 1))
    counter = np.empty(1, np.int64)
    counter[0] = 0
    for _ in numba.prange(threads):
        scores = np.empty((most, NR), np.float32)
        queries = np.empty((tokens * group, head_dim), np.float32)
        lanes = np.empty(NR, np.float32)
        totals = np.empty(tokens * group, np.float32)
        parts = values.shape[2]
        sums = np.empty((parts, MR, NR), np.float32)
        earlier = np.zeros((parts, MR, NR), np.float32)
        panels = np.empty(first_panels.shape[1] * panels_per_page, np.int64)
        task, mine = 0, claimed(counter)
        for sequence in range(first_panels.shape[0]):
            last = positions[cu_seqlens[sequence + 1] - 1]
            for i in range(last // NR + 1):
                panels[i] = _panel(first_panels[sequence], panels_per_page, i)
            for head in range(kv_heads):
                for begin in range(cu_seqlens[sequence], cu_seqlens[sequence + 1], tokens):
                    if task == mine:
                        end = min(begin + tokens, cu_seqlens[sequence + 1])
                        _attend_rows(
                            qkv, begin, end, positions, head, group, keys, values, panels, scale,
                            table, queries, scores, lanes, totals, sums, earlier, out,
                        )  # fmt: skip
                        mine = claimed(counter)
                    task += 1
