"""Products have the bits that chains.py promises, which are those of cuda too."""

from __future__ import annotations

import lfm2kit_cuda.chains
import numpy as np
import pytest
from lfm2kit_cpu_simd.chains import chain_bounds
from lfm2kit_cpu_simd.gemm import ROWS_AT_ONCE, STRETCH, linear
from lfm2kit_cpu_simd.machine import NR
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.tile import MR

from lfm2kit.weights import Tensor
from tests.cpu_simd.twins import HAS_FMA, Float32, assert_same_bits, product

pytestmark = pytest.mark.skipif(not HAS_FMA, reason="the CPU has no fused multiply-adds")

# Astride steps, ranges and stretches; those of the embedded model and of LFM2-8B-A1B.
DEPTHS = (
    1, 31, 32, 33, 48, 63, 64, 65, 128, STRETCH - 1, STRETCH + 1, 191, 192, 193, 255, 256, 257, 320,
    383, 385, 769, 1792, 2047, 2048, 2049,
)  # fmt: skip


@pytest.fixture
def rng() -> np.random.Generator:
    """Return other numbers in every run; the seed is shown if a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def numbers(rng: np.random.Generator, *shape: int) -> Float32:
    """Random numbers of many sizes, with zeros of either sign."""
    values = rng.standard_normal(shape, np.float32) * np.exp2(rng.integers(-20, 20, shape))
    values[rng.random(shape) < 0.05] *= 0
    return values.astype(np.float32)


def test_cuda_cuts_all_products_at_the_same_places() -> None:
    for k in (*range(1, 3000), 7168, 14336):
        bounds = chain_bounds.py_func(k)
        assert bounds.tolist() == sorted(set(lfm2kit_cuda.chains.chain_bounds(k)))


def assert_is_the_twins(x: Float32, weight: Float32) -> None:
    got = linear(x, pack([[Tensor.of_array("w", weight)]]), len(weight))
    assert_same_bits(got, product(x, weight, lfm2kit_cuda.chains.chain_bounds(x.shape[1])))


@pytest.mark.parametrize("k", DEPTHS)
def test_a_product_adds_chains_in_order(rng: np.random.Generator, k: int, threads: int) -> None:
    for rows in (1, MR, MR + 1, 3 * MR + 1):
        assert_is_the_twins(numbers(rng, rows, k), numbers(rng, NR + 1, k))


@pytest.mark.parametrize("rows", [ROWS_AT_ONCE, ROWS_AT_ONCE + 1])
def test_the_longest_product_in_bands(rng: np.random.Generator, rows: int) -> None:
    assert_is_the_twins(numbers(rng, rows, 7168), numbers(rng, 9, 7168))


def test_subnormal_numbers_stay(rng: np.random.Generator) -> None:
    x, weight = (
        rng.standard_normal((n, 2048), np.float32) * np.float32(2.0**-68) for n in (MR, NR)
    )
    got = linear(x, pack([[Tensor.of_array("w", weight)]]), NR)
    assert (abs(got) < np.finfo(np.float32).tiny).all()
    assert got.all()
    assert_is_the_twins(x, weight)


@pytest.mark.parametrize("k", [1, 32, 192, 200])
def test_a_sum_that_is_zero_is_positive(k: int) -> None:
    """Though each chain is -0: its terms are too small for float32."""
    x, weight = np.full((1, k), -1e-30, np.float32), np.full((1, k), 1e-30, np.float32)
    got = linear(x, pack([[Tensor.of_array("w", weight)]]), 1)
    assert_same_bits(got, np.zeros((1, 1), np.float32))
    assert_is_the_twins(x, weight)
