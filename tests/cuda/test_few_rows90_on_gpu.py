"""16-bit products of few rows on a real Hopper: the bits of gemm90.cu, in all that is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.constants import FEW_ROWS90
from lfm2kit_cuda.requirements import why_unavailable

from tests.cuda import few_row_inputs
from tests.cuda.few_row_inputs import SHAPES, random, uneven_choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

ROWS = (*range(1, 9), 9, 16)
tensors = partial(few_row_inputs.tensors, scale=1 / 16)


def bits(array: Any) -> Any:
    return array.view(f"u{array.itemsize}")


def poison(array: Any) -> int:
    """Return the bits of all elements of an output before: ones."""
    return int(np.iinfo(bits(array).dtype).max)


def assert_same(got: Any, want: Any) -> None:
    assert (bits(got) == bits(want)).all()
    assert (bits(want) != poison(want)).all()


def assert_untouched(array: Any) -> None:
    assert (bits(array) == poison(array)).all()


@pytest.fixture(params=["bf16", "fp16"])
def gemm(request: pytest.FixtureRequest) -> Any:
    from lfm2kit_cuda import arithmetic, device

    if device.compute_capability()[0] != 9:
        pytest.skip("it takes a chip of compute capability 9.0")
    gemm: Any = arithmetic.arithmetic(request.param)
    gemm.few_rows = 0  # it has the kernels of gemm90.cu for all tiles
    return gemm


def by_few(gemm: Any, call: Callable[[], Any]) -> Any:
    """Return what `call` does where tiles of few rows have their own kernels."""
    gemm.few_rows = FEW_ROWS90.MOST_ROWS
    try:
        return call()
    finally:
        gemm.few_rows = 0


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    empty = cupy.empty

    def poisoned(shape: Any, dtype: Any = np.float32) -> Any:
        array = empty(shape, dtype)
        bits(array).fill(poison(array))
        return array

    monkeypatch.setattr(cupy, "empty", poisoned)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_rows(gemm: Any, rng: np.random.Generator, shape: tuple[int, int]) -> None:
    import cupy

    out, inputs = shape
    matrix, bias = gemm.pack(tensors(rng, 1, out, inputs)), cupy.asarray(random(rng, out))
    for rows in ROWS:
        x = gemm.rounded(cupy.asarray(random(rng, rows, inputs)))
        for of in (bias, None):
            for linear in (gemm.linear, gemm.linear_rounded):
                call = partial(linear, x, matrix, of)
                assert_same(by_few(gemm, call), call())


def test_a_kernel_is_launched_with_much_and_with_little_shared_memory(
    gemm: Any, rng: np.random.Generator
) -> None:
    """CTAs with several tiles take more of it; what a kernel may take is kept for all launches."""
    import cupy

    x = gemm.rounded(cupy.asarray(random(rng, 5, 64)))
    for columns in (40000, 320, 40000):
        call = partial(gemm.linear, x, gemm.pack(tensors(rng, 1, columns, 64)))
        assert_same(by_few(gemm, call), call())


@pytest.mark.parametrize("shape", [(3584, 2048), (7168, 2048), (320, 128), (69, 107)], ids=str)
def test_gated(gemm: Any, rng: np.random.Generator, shape: tuple[int, int]) -> None:
    import cupy

    w13 = gemm.pack_gated(tensors(rng, 1, *shape), tensors(rng, 1, *shape))
    for rows in ROWS:
        x = gemm.rounded(cupy.asarray(random(rng, rows, shape[1])))
        call = partial(gemm.gated, x, w13)
        got, want = by_few(gemm, call).array, call().array
        assert_same(got[:, :, :rows], want[:, :, :rows])
        assert_untouched(got[:, :, rows:])


@pytest.mark.parametrize("tile_rows", [8, 16])
@pytest.mark.parametrize("tokens", [1, 3, 16, 64])
def test_experts(gemm: Any, rng: np.random.Generator, tokens: int, tile_rows: int) -> None:
    """A few experts get more rows than a tile has, and some get none."""
    import cupy
    from lfm2kit_cuda.blocks.grouping import grouped_by_expert
    from lfm2kit_cuda.products import Tiling

    class Few:
        """The arithmetic as far as grouping asks it, with tiles of few rows."""

        def tiling(self, pairs: int, groups: int) -> Any:
            return Tiling(tile_rows, step=8)

    experts, hidden, inner = 32, 2048, 1792
    w13 = gemm.pack_gated(
        tensors(rng, experts, inner, hidden), tensors(rng, experts, inner, hidden)
    )
    w2 = gemm.pack_down(tensors(rng, experts, hidden, inner))
    ids = cupy.asarray(uneven_choice(rng, tokens, experts))
    everyone = cupy.arange(experts, dtype=cupy.int32)
    x = gemm.rounded(cupy.asarray(random(rng, tokens, hidden)))

    tiles, place = grouped_by_expert(ids, everyone, experts, gemm)
    gated = gemm.gated(x, w13, tiles)
    want = gemm.down(gated, w2, tiles)
    fews, its_place = grouped_by_expert(ids, everyone, experts, Few())  # type: ignore[arg-type]
    assert (place == its_place).all()
    its_gated = by_few(gemm, partial(gemm.gated, x, w13, fews))
    got = by_few(gemm, partial(gemm.down, its_gated, w2, fews))

    slots = place.ravel()
    assert_same(its_gated.array[:, :, slots], gated.array[:, :, slots])
    assert_same(got[slots], want[slots])
    nobodys = cupy.asarray(np.setdiff1d(np.arange(len(got)), slots.get()))
    assert_untouched(got[nobodys])
    assert_untouched(its_gated.array[:, :, nobodys])
