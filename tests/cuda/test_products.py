"""Products on tensor cores on a real GPU: against float64, and the same bits from every tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.backend import Tensor
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F16, F32, Format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

Float32 = npt.NDArray[np.float32]
ROWS = (1, 15, 16, 17, 33, 96, 191, 193, 257)
SHAPES = ((37, 13), (128, 64), (300, 136), (513, 200))  # out, in
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11}  # at most, relative


def hopper(precision: str) -> Any:
    from lfm2kit_cuda import arithmetic, device

    if device.compute_capability()[0] != 9:
        pytest.skip("it takes a chip of compute capability 9.0")
    return arithmetic.arithmetic(precision)


def random(rng: np.random.Generator, *shape: int) -> Float32:
    """Return numbers that BF16 and F16 hold exactly, so that only the sums are rounded."""
    return (rng.integers(-128, 129, shape) / 64).astype(np.float32)


def matrices(rng: np.random.Generator, groups: int, *shape: int) -> list[Tensor]:
    return [Tensor.of_array("w", random(rng, *shape)) for _ in range(groups)]


def assert_close(got: Any, want: npt.NDArray[np.float64], within: float) -> None:
    error = np.linalg.norm(np.asarray(got.get(), np.float64) - want) / np.linalg.norm(want)
    assert error <= within  # false for NaN as well


def assert_rounded(got: Any, sums: Any, format: Format) -> None:
    """Check that `got` has the bits of what is nearest to `sums`, of two the even."""
    want = Tensor.of_array("sums", sums.get()).stored_as(format).data
    assert np.array_equal(got.get(), want.view(np.uint16))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32x3"])
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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_rounded(precision: str, rows: int, shape: tuple[int, int]) -> None:
    """By the kernel for older chips too; sums are multiples of 2^-12, and ties are common."""
    import cupy
    from lfm2kit_cuda.gemm16 import TensorCoreGemm

    newest, rng = hopper(precision), np.random.default_rng(rows)
    (weight,), x, bias = (
        matrices(rng, 1, *shape),
        random(rng, rows, shape[1]),
        random(rng, shape[0]),
    )
    want = x.astype(np.float64) @ weight.data.astype(np.float64).T + bias
    dtype = newest.activation
    for gemm in (newest, TensorCoreGemm(dtype)):
        of = gemm.rounded(cupy.asarray(x)), gemm.pack([weight]), cupy.asarray(bias)
        got = gemm.linear_rounded(*of)
        assert_rounded(got, gemm.linear(*of), newest.packed_format)
        bits = got.get() if dtype == "BF16" else got.get().view(np.float16)
        error = abs(Tensor.of_array("got", bits, newest.packed_format).float32() - want)
        assert (error <= ROUNDING[dtype] * abs(want) + 1e-6 * abs(want).max()).all()


@pytest.mark.parametrize("columns", [37, 300])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_linear_rounded_of_experts(precision: str, columns: int) -> None:
    import cupy
    from lfm2kit_cuda.blocks.grouping import grouped_by_expert
    from lfm2kit_cuda.gemm16 import TensorCoreGemm

    newest, rng = hopper(precision), np.random.default_rng(columns)
    weights, x = matrices(rng, 5, columns, 136), cupy.asarray(random(rng, 97, 136))
    ids = cupy.asarray(rng.random((97, 5)).argsort(axis=1)[:, :2].astype(np.int32))
    for gemm in (newest, TensorCoreGemm(newest.activation)):
        tiles, place = grouped_by_expert(ids, cupy.arange(5, dtype=cupy.int32), 5, gemm)
        of = gemm.rounded(x), gemm.pack(weights), None, tiles
        got, sums = gemm.linear_rounded(*of)[place], gemm.linear(*of)[place]
        assert_rounded(got, sums, newest.packed_format)


def test_what_f16_does_not_hold_becomes_its_largest() -> None:
    import cupy

    gemm = hopper("fp16")
    x = gemm.rounded(cupy.asarray([[1e4], [-1e4]], cupy.float32))
    got = gemm.linear_rounded(x, gemm.pack([Tensor.of_array("w", np.full((8, 1), 10, np.float32))]))
    assert np.array_equal(got.get().view(np.float16)[:, 0], [65504, -65504])


@pytest.mark.parametrize("favourites", [0.0, 3.0])
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("precision", ["bf16", "fp32x3"])
def test_experts_rows_are_gathered(precision: str, tokens: int, favourites: float) -> None:
    import cupy
    from lfm2kit_cuda.blocks.grouping import grouped_by_expert

    gemm, rng, experts, taken = hopper(precision), np.random.default_rng(tokens), 5, 2
    weights, x = matrices(rng, experts, 300, 136), random(rng, tokens, 136)
    scores = rng.random((tokens, experts)) + favourites * np.linspace(1, 0, experts)
    ids = np.argsort(-scores, axis=1)[:, :taken].astype(np.int32)
    local = cupy.arange(experts, dtype=cupy.int32)
    tiles, place = grouped_by_expert(cupy.asarray(ids), local, experts, gemm)
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


@pytest.mark.parametrize(("rows", "inputs"), [(33, 136), (256, 2048), (256, 7168)])
def test_three_terms_are_as_near_as_float32(rows: int, inputs: int) -> None:
    import cupy
    from lfm2kit_cuda.gemm import Gemm

    rng = np.random.default_rng(inputs)
    (weight,) = matrices(rng, 1, 300, inputs)
    x = rng.standard_normal((rows, inputs), dtype=np.float32)
    want = x.astype(np.float64) @ weight.data.astype(np.float64).T
    three, single = (
        gemm.linear(gemm.rounded(cupy.asarray(x)), gemm.pack([weight])).get()
        for gemm in (hopper("fp32x3"), Gemm())
    )
    assert np.linalg.norm(three - want) <= np.linalg.norm(single - want)


def test_three_terms_of_gated_go_on_as_float32() -> None:
    import cupy

    gemm, rng = hopper("fp32x3"), np.random.default_rng(3)
    (w1, w3), (w2,) = matrices(rng, 2, 300, 136), matrices(rng, 1, 24, 300)
    x = rng.standard_normal((97, 136), dtype=np.float32) / 8
    inner = gemm.gated(gemm.rounded(cupy.asarray(x)), gemm.pack_gated([w1], [w3]))
    got = gemm.linear(inner, gemm.pack([w2]))
    gate, up = (x.astype(np.float64) @ w.data.astype(np.float64).T for w in (w1, w3))
    want = gate / (1 + np.exp(-gate)) * up @ w2.data.astype(np.float64).T
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("format", [F32, F16], ids=str)
def test_three_terms_refuse_weights_that_bf16_does_not_hold(format: Format) -> None:
    gemm = hopper("fp32x3")
    weight = np.ones((40, 30), np.float32)
    gemm.pack([Tensor.of_array("w", weight).stored_as(format)])
    weight[39, 29] = 1 + 2.0**-8
    with pytest.raises(Lfm2kitError, match=r"'layers\.0\.w'.*precision='fp32'"):
        gemm.pack([Tensor.of_array("layers.0.w", weight).stored_as(format)])


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32x3"])
def test_every_tile_gives_the_same_bits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from lfm2kit_cuda.products import Ctas

    gemm, rng = hopper(precision), np.random.default_rng(5)
    x = gemm.rounded(cupy.asarray(rng.standard_normal((400, 330), dtype=np.float32)))
    w1, w3 = matrices(rng, 2, 200, 330)
    linear, gated = gemm.pack([w1]), gemm.pack_gated([w1], [w3])
    first: list[Any] = []
    for tile in gemm._ctas.menu:
        menu = Ctas(gemm._ctas.threads, (1.0,), {tile: 1})
        monkeypatch.setattr(gemm, "_ctas", menu)
        results = [
            gemm.linear(x, linear).get(),
            gemm.linear_rounded(x, linear).get(),
            gemm.gated(x, gated).array.get()[:, :, :400],
        ]
        first = first or results
        for result, expected in zip(results, first, strict=True):
            assert np.array_equal(result, expected), tile
