"""Products of few rows on a real GPU: the bits of gemm.cu, at the release's sizes and odd ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from tests.cuda.few_row_inputs import SHAPES, random, tensors, uneven_choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]


def assert_same_bits(got: Any, want: Any) -> None:
    assert (got.view(np.uint32) == want.view(np.uint32)).all()


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the FP32 product; what it allocates holds NaN, so that nothing is left unwritten."""
    import cupy
    from lfm2kit_cuda import few_rows
    from lfm2kit_cuda.arithmetic import arithmetic

    if not few_rows.are_few(1, 32):
        pytest.skip("it takes a chip of compute capability 8.0")
    empty = cupy.empty

    def poisoned(shape: Any, dtype: Any = np.float32) -> Any:
        array = empty(shape, dtype)
        array.view(np.uint8).fill(0xFF)
        return array

    monkeypatch.setattr(few_rows.cupy, "empty", poisoned)
    return arithmetic("fp32")


def by_many(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """Return what `call` does where all products are those of many rows."""
    from lfm2kit_cuda import few_rows

    with monkeypatch.context() as context:
        context.setattr(few_rows, "are_few", lambda rows, width: False)
        context.setattr(few_rows, "tiling", lambda pairs, groups: None)
        return call()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_rows(
    gemm: Any, rng: np.random.Generator, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy
    from lfm2kit_cuda import few_rows

    out, inputs = shape
    matrix, bias = gemm.pack(tensors(rng, 1, out, inputs)), cupy.asarray(random(rng, out))
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32):
        x = gemm.rounded(cupy.asarray(random(rng, rows, inputs)))
        want = by_many(monkeypatch, lambda x=x: gemm.linear(x, matrix, bias))
        assert_same_bits(few_rows.linear(x, matrix, bias, None), want)
        assert_same_bits(gemm.linear(x, matrix, bias), want)


@pytest.mark.parametrize("shape", [(7168, 2048), (320, 128), (69, 107)], ids=str)
def test_an_mlp(
    gemm: Any, rng: np.random.Generator, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    inner, hidden = shape
    w13 = gemm.pack_gated(tensors(rng, 1, inner, hidden), tensors(rng, 1, inner, hidden))
    w2 = gemm.pack(tensors(rng, 1, hidden, inner))
    for rows in (0, 1, 2, 3, 7, 8, 9, 16, 40):
        x = gemm.rounded(cupy.asarray(random(rng, rows, hidden)))
        want = by_many(monkeypatch, lambda x=x: gemm.linear(gemm.gated(x, w13), w2))
        assert_same_bits(gemm.linear(gemm.gated(x, w13), w2), want)


@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 32, 64])
def test_experts(
    gemm: Any, rng: np.random.Generator, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few experts get more rows than a tile has, and some get none."""
    import cupy
    from lfm2kit_cuda.blocks.grouping import grouped_by_expert

    experts, hidden, inner = 32, 2048, 1792
    w13 = gemm.pack_gated(
        tensors(rng, experts, inner, hidden), tensors(rng, experts, inner, hidden)
    )
    w2 = gemm.pack_down(tensors(rng, experts, hidden, inner))
    ids = cupy.asarray(uneven_choice(rng, tokens, experts))
    everyone = cupy.arange(experts, dtype=cupy.int32)
    x = gemm.rounded(cupy.asarray(random(rng, tokens, hidden)))

    def outputs() -> Any:
        tiles, place = grouped_by_expert(ids, everyone, experts, gemm)
        return gemm.down(gemm.gated(x, w13, tiles), w2, tiles)[place.ravel()]

    assert_same_bits(outputs(), by_many(monkeypatch, outputs))
