"""Products on tensor cores on a real GPU: against float64, and the same bits from every tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.backend import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

Float32 = npt.NDArray[np.float32]
ROWS = (1, 15, 16, 17, 33, 96, 191, 193, 257)
SHAPES = ((37, 13), (128, 64), (300, 136), (513, 200))  # out, in


def hopper(precision: str) -> Any:
    from lfm2kit_cuda import arithmetic, gemm90

    gemm = arithmetic.arithmetic(precision)
    if not isinstance(gemm, gemm90.HopperGemm):
        pytest.skip("it takes a chip of compute capability 9.0")
    return gemm


def random(rng: np.random.Generator, *shape: int) -> Float32:
    """Numbers that BF16 and F16 hold exactly, so that only the sums are rounded."""
    return (rng.integers(-128, 129, shape) / 64).astype(np.float32)


def matrices(rng: np.random.Generator, groups: int, *shape: int) -> list[Tensor]:
    return [Tensor("w", "F32", random(rng, *shape)) for _ in range(groups)]


def assert_close(got: Any, want: npt.NDArray[np.float64], within: float) -> None:
    error = np.linalg.norm(np.asarray(got.get(), np.float64) - want) / np.linalg.norm(want)
    assert error <= within  # false for NaN as well


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(precision: str, rows: int, shape: tuple[int, int]) -> None:
    import cupy

    gemm, rng = hopper(precision), np.random.default_rng(rows)
    (weight,), x = matrices(rng, 1, *shape), random(rng, rows, shape[1])
    bias = random(rng, shape[0])
    got = gemm.linear(gemm.rounded(cupy.asarray(x)), gemm.pack([weight]), cupy.asarray(bias))
    want = x.astype(np.float64) @ weight.data.astype(np.float64).T + bias
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("favourites", [0.0, 3.0])
@pytest.mark.parametrize("tokens", ROWS)
def test_experts_rows_are_gathered(tokens: int, favourites: float) -> None:
    import cupy
    from lfm2kit_cuda.blocks.feed_forward import grouped_by_expert

    gemm, rng, experts, taken = hopper("bf16"), np.random.default_rng(tokens), 5, 2
    weights, x = matrices(rng, experts, 300, 136), random(rng, tokens, 136)
    scores = rng.random((tokens, experts)) + favourites * np.linspace(1, 0, experts)
    ids = np.argsort(-scores, axis=1)[:, :taken].astype(np.int32)
    tiles, place = grouped_by_expert(cupy.asarray(ids), range(experts), gemm)
    got = gemm.linear(gemm.rounded(cupy.asarray(x)), gemm.pack(weights), tiles=tiles)
    each = np.stack([x.astype(np.float64) @ w.data.astype(np.float64).T for w in weights])
    want = each[ids, np.arange(tokens)[:, None]].reshape(tokens * taken, -1)
    assert_close(got[place], want, 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", ROWS)
def test_gated_is_that_of_the_kernel_for_older_chips(precision: str, rows: int) -> None:
    import cupy
    from lfm2kit_cuda.gemm16 import TensorCoreGemm

    gemm, rng = hopper(precision), np.random.default_rng(rows)
    older = TensorCoreGemm(gemm.activation)
    (w1, w3), x = matrices(rng, 2, 300, 136), cupy.asarray(random(rng, rows, 136) / 8)
    inner = [one.gated(one.rounded(x), one.pack_gated([w1], [w3])) for one in (gemm, older)]
    down = matrices(rng, 1, 24, 300)  # reads what either has stored
    got, want = (
        one.linear(stored, one.pack_down(down)).get()
        for one, stored in zip((gemm, older), inner, strict=True)
    )
    assert np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)  # a rounding in some places


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_tile_gives_the_same_bits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from lfm2kit_cuda import gemm90
    from lfm2kit_cuda.products import Blocks

    gemm, rng = hopper(precision), np.random.default_rng(5)
    x = gemm.rounded(cupy.asarray(rng.standard_normal((400, 330), dtype=np.float32)))
    w1, w3 = (Tensor("w", "F32", rng.standard_normal((200, 330), np.float32)) for _ in range(2))
    linear, gated = gemm.pack([w1]), gemm.pack_gated([w1], [w3])
    first: list[Any] = []
    for tile in gemm90.BLOCKS.menu:
        menu = Blocks(gemm90.BLOCKS.threads, (1.0,), {tile: 1})
        monkeypatch.setattr(gemm90, "BLOCKS", menu)
        results = [gemm.linear(x, linear).get(), gemm.gated(x, gated).get()]
        first = first or results
        for result, expected in zip(results, first, strict=True):
            assert np.array_equal(result, expected), tile
