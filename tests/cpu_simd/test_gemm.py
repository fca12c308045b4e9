"""The grouped product against its slow twin, at sizes astride the edges of tiles and panels."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_cpu_simd.gemm import ROWS_AT_ONCE, STRETCH, group_of, grouped, linear
from lfm2kit_cpu_simd.machine import NR, STORAGES
from lfm2kit_cpu_simd.packing import HALF, pack, pack_gated
from lfm2kit_cpu_simd.tile import MR, SHARED_FROM, lane_order

from lfm2kit.formats import BF16, F16, F32
from lfm2kit.testing.random_weights import stored_as
from lfm2kit.weights import Tensor, Weights

ROWS = (0, 1, 3, 5, 6, 7, 15, 16, 17, 33)
COLUMNS = (1, HALF - 1, HALF, HALF + 1, NR - 1, NR, NR + 1, 2 * NR + 3)
DEPTHS = (1, 2, 3, 4, 5, 7, 64, 65)
# The most whose tiles each widen for themselves, and one more.
SHARED_ROWS = [(SHARED_FROM[s] - 1) * MR + i for s in STORAGES[1:] for i in (0, 1)]
MANY_ROWS = sorted({
    *SHARED_ROWS, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 2 * ROWS_AT_ONCE + 1,
    255, 256, 257,
})  # fmt: skip

Float64 = npt.NDArray[np.float64]


def matrices(rng: Any, count: int, shape: tuple[int, int], storage: str) -> list[Tensor]:
    arrays = {str(i): rng.standard_normal(shape).astype(np.float32) for i in range(count)}
    weights = stored_as(Weights.of_arrays(arrays), storage)  # type: ignore[arg-type]
    return [weights[name] for name in arrays]


def silu(x: Float64) -> Float64:
    return x / (1 + np.exp(-x))


def slow(x: Any, offsets: Any, tensors: list[Tensor]) -> Float64:
    """Multiply row by row, in float64."""
    groups = np.repeat(np.arange(len(tensors)), np.diff(offsets))
    values = [t.float32().astype(np.float64) for t in tensors]
    out = [values[g] @ row for g, row in zip(groups, x.astype(np.float64), strict=True)]
    return np.array(out).reshape(len(x), tensors[0].shape[0])


def assert_close(got: Any, want: Float64) -> None:
    assert got.shape == want.shape
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_dense_product_at_every_edge(rows: int, storage: str, threads: int) -> None:
    rng = np.random.default_rng(rows)
    for columns in COLUMNS:
        for k in DEPTHS:
            (w,) = matrices(rng, 1, (columns, k), storage)
            x = rng.standard_normal((rows, k)).astype(np.float32)
            bias = rng.standard_normal(columns).astype(np.float32)
            want = slow(x, [0, rows], [w])
            assert_close(linear(x, pack([[w]]), columns), want)
            assert_close(linear(x, pack([[w]]), columns, bias), want + bias)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [1, 7, *MANY_ROWS])
def test_a_product_at_the_edges_of_stretches_and_bands(
    rows: int, storage: str, threads: int
) -> None:
    rng = np.random.default_rng(rows)
    for k in (STRETCH - 1, STRETCH, STRETCH + 1, 2 * STRETCH + 3):
        (w,) = matrices(rng, 1, (NR + 1, k), storage)
        x = rng.standard_normal((rows, k)).astype(np.float32)
        assert_close(linear(x, pack([[w]]), NR + 1), slow(x, [0, rows], [w]))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, *MANY_ROWS])
def test_a_product_writes_all_of_its_result_and_nothing_behind_it(rows: int, threads: int) -> None:
    rng = np.random.default_rng(rows)
    columns, k = 3 * NR + 5, STRETCH + 3
    (w,) = matrices(rng, 1, (columns, k), BF16)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    memory = BUFFERS.array("projected", rows + 1, columns)
    memory[:] = np.nan
    assert_close(linear(x, pack([[w]]), columns, buffer="projected"), slow(x, [0, rows], [w]))
    assert np.isnan(memory[rows]).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_groups_of_every_size_some_of_them_empty(storage: str, threads: int) -> None:
    rng = np.random.default_rng(1)
    counts = np.array([0, 7, 0, 1, 33, 2 * ROWS_AT_ONCE + 1, 16, 0])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for columns in COLUMNS:
        w = matrices(rng, len(counts), (columns, 13), storage)
        x = rng.standard_normal((offsets[-1], 13)).astype(np.float32)
        assert_close(grouped(x, offsets, pack([[m] for m in w]), columns), slow(x, offsets, w))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_gated_product_pairs_each_gate_with_its_own_up(
    rows: int, storage: str, threads: int
) -> None:
    rng = np.random.default_rng(rows)
    for columns in COLUMNS:
        gates = matrices(rng, 2, (columns, 9), storage)
        ups = matrices(rng, 2, (columns, 9), storage)
        offsets = np.array([0, rows // 3, rows])
        x = rng.standard_normal((rows, 9)).astype(np.float32)
        want = silu(slow(x, offsets, gates)) * slow(x, offsets, ups)
        assert_close(grouped(x, offsets, pack_gated(gates, ups), columns), want)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(storage: str, threads: int) -> None:
    rng = np.random.default_rng(2)
    (w,) = matrices(rng, 1, (NR + 5, STRETCH + 100), storage)
    panels = pack([[w]])
    most = max(MANY_ROWS)
    x = rng.standard_normal((most, STRETCH + 100)).astype(np.float32)
    alone = np.concatenate([linear(x[i : i + 1], panels, NR + 5) for i in range(most)])
    for rows in (*range(1, ROWS_AT_ONCE + 3), *MANY_ROWS):
        np.testing.assert_array_equal(linear(x[:rows], panels, NR + 5), alone[:rows])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k", [160, 161, 192, 193, 257, 383, 2049])  # five chains, then six
def test_a_row_alone_has_the_bits_that_it_has_beside_another(storage: str, k: int) -> None:
    rng = np.random.default_rng(k)
    (w,) = matrices(rng, 1, (NR + 5, k), storage)
    panels = pack([[w]])
    x = rng.standard_normal((2, k)).astype(np.float32)
    alone = np.concatenate([linear(row, panels, NR + 5) for row in (x[:1], x[1:])])
    np.testing.assert_array_equal(alone, linear(x, panels, NR + 5))


@pytest.mark.parametrize("columns", [NR - 1, 3 * NR])  # fewer panels than threads, and more
@pytest.mark.parametrize("storage", STORAGES)
def test_two_threads_give_the_bits_of_one(storage: str, columns: int) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    rng = np.random.default_rng(6)
    w = matrices(rng, 2, (columns, STRETCH + 1), storage)
    panels, offsets = pack([[m] for m in w]), np.array([0, ROWS_AT_ONCE + 1, 257])
    x = rng.standard_normal((257, STRETCH + 1)).astype(np.float32)
    before, got = numba.get_num_threads(), []
    try:
        for count in (1, 2):
            CREW.hire(count)
            got.append(grouped(x, offsets, panels, columns))
    finally:
        CREW.hire(before)
    np.testing.assert_array_equal(*got)


def test_every_panel_of_every_band_is_one_task() -> None:
    offsets, count = np.cumsum([0, 3, 0, ROWS_AT_ONCE + 1, 0, 1, 0]), 5
    bands = [1, 0, 2, 0, 1, 0]
    tasks = [(group, before) for group, n in enumerate(bands) for before in range(n * count)]
    for start in (0, 7):  # from the task's own place on, or from the beginning
        group, before = group_of(start, 0, 0, offsets, count)
        for task, (of_group, within) in list(enumerate(tasks))[start:]:
            group, before = group_of(task, group, before, offsets, count)
            assert (group, task - before) == (of_group, within)
    assert group_of(len(tasks), 0, 0, offsets, count)[0] == len(bands)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_of_16_bits_has_the_bits_of_its_float32_values(storage: str) -> None:
    rng = np.random.default_rng(3)
    (w,) = matrices(rng, 1, (70, STRETCH + 50), storage)
    wide = Tensor.of_array("", w.float32())
    for rows in (1, 6, *MANY_ROWS):
        x = rng.standard_normal((rows, STRETCH + 50)).astype(np.float32)
        np.testing.assert_array_equal(linear(x, pack([[w]]), 70), linear(x, pack([[wide]]), 70))


def test_matrices_of_several_types_are_kept_in_one_that_holds_them_all() -> None:
    rng = np.random.default_rng(4)
    mixed = [matrices(rng, 1, (5, 8), storage)[0] for storage in (BF16, F16, F32)]
    x = rng.standard_normal((6, 8)).astype(np.float32)
    offsets = np.array([0, 2, 4, 6])
    packed = pack([[m] for m in mixed])
    assert packed.data.dtype == np.float32
    assert_close(grouped(x, offsets, packed, 5), slow(x, offsets, mixed))


def test_matrices_below_each_other_make_one_product() -> None:
    rng = np.random.default_rng(5)
    parts = [matrices(rng, 1, (rows, 8), BF16)[0] for rows in (NR - 3, 5, NR + 2)]
    x = rng.standard_normal((7, 8)).astype(np.float32)
    want = np.concatenate([slow(x, [0, 7], [part]) for part in parts], axis=1)
    assert_close(linear(x, pack([parts]), 2 * NR + 4), want)


@pytest.mark.parametrize("storage", STORAGES)
def test_lane_order_puts_every_column_somewhere_else(storage: str) -> None:
    assert sorted(lane_order(storage)) == list(range(NR))
