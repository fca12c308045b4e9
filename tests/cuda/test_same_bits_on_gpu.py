"""FP32 products, MLPs, experts and heads have cpu_simd's bits on a real GPU, at any size."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cpu_simd import elementwise
from lfm2kit_cuda.compiling import OPTIONS, architecture_name
from lfm2kit_cuda.nvrtc import compile_cubin
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit import specs
from lfm2kit.backend import Context
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.testing.host_block import host_block
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights
from tests.cpu_simd.twins import HAS_FMA, assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
    pytest.mark.skipif(not HAS_FMA, reason="the CPU has no fused multiply-adds"),
]

Float32 = npt.NDArray[np.float32]

ROWS = (1, 2, 8, 9, 16, 17, 47, 48, 49, 131, 600)
BLOCKS: tuple[specs.Spec, ...] = (
    specs.MLP(20, 44),
    specs.MLP(107, 69),
    specs.MLP(128, 320),
    specs.MLP(2048, 7168),
    specs.Experts(107, 69, 7, 3, (0, 2, 3, 5, 6)),
    specs.Experts(128, 48, 16, 4, tuple(range(16))),
    specs.Experts(2048, 1792, 6, 2, tuple(range(6))),
    specs.LMHead(1001, 107),
    specs.LMHead(8195, 2048),
)
SOURCE = """
#include "types.cuh"
#include "silu.cuh"
extern "C" __global__ void silus(const float* x_n, float* out_n, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out_n[i] = silu(x_n[i]);
}
extern "C" __global__ void reciprocals(const float* x_n, float* out_n, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out_n[i] = reciprocal(x_n[i]);
}
"""


@cache
def backend(name: str) -> Any:
    return installed_plugins().creator(Context())(name)


@pytest.mark.parametrize("spec", BLOCKS, ids=str)
def test_a_block_has_the_bits_of_cpu_simd(rng: np.random.Generator, spec: Any) -> None:
    weights = random_weights(spec, rng)
    gpu, cpu = (host_block(backend(name), spec, weights) for name in ("cuda", "cpu_simd"))
    for rows in ROWS:
        for scale in (1.0, 30.0):
            inputs = random_inputs(spec, rng, rows, scale)
            assert_same_bits(gpu(*inputs), cpu(*inputs))


def test_an_expert_has_the_same_bits_alone_there_and_in_a_batch_here(
    rng: np.random.Generator,
) -> None:
    spec = specs.Experts(2048, 1792, 4, 2, tuple(range(4)))
    weights = random_weights(spec, rng)
    gpu, cpu = (host_block(backend(name), spec, weights) for name in ("cuda", "cpu_simd"))
    x, ids, expert_weights = random_inputs(spec, rng, 200)
    together, order = gpu(x, ids, expert_weights), rng.permutation(200)
    assert_same_bits(cpu(x[order], ids[order], expert_weights[order]), together[order])
    for row in order[:10]:
        one = slice(row, row + 1)
        assert_same_bits(cpu(x[one], ids[one], expert_weights[one]), together[one])


def on_gpu(name: str, x: Float32) -> Float32:
    import cupy
    from lfm2kit_cuda.device import compute_capability

    module = cupy.cuda.function.Module()
    architecture = architecture_name(*compute_capability())
    options = (f"--gpu-architecture={architecture}", *OPTIONS)
    module.load(compile_cubin(SOURCE, "silus.cu", options))
    there = cupy.asarray(x)
    out = cupy.empty_like(there)
    module.get_function(name)((-(-x.size // 256),), (256,), (there, out, np.int32(x.size)))
    return np.asarray(out.get())


@pytest.mark.parametrize("exponent", [0, 1, 24, 125])
def test_reciprocals_are_rounded_to_nearest(exponent: int) -> None:
    """For every mantissa: which ones go wrong depends on the chip's approximation."""
    mantissas = np.arange(2**23, dtype=np.int32)
    x = ((127 + exponent << 23) | mantissas).astype(np.int32).view(np.float32)
    assert_same_bits(on_gpu("reciprocals", x), np.float32(1) / x)


def test_silu_of_any_number_has_the_bits_of_cpu_simd(rng: np.random.Generator) -> None:
    vector_silu = numba.vectorize(["float32(float32)"])(lambda x: elementwise.silu(x))
    bits = rng.integers(-(2**31), 2**31, 2**23).astype(np.int32)
    usual = rng.uniform(-100, 100, 2**23).astype(np.float32)
    for x in (bits.view(np.float32), usual):
        with np.errstate(all="ignore"):
            assert_same_bits(on_gpu("silus", x), vector_silu(x))
