"""The norms, where a sum of squares is too large for float32."""

from __future__ import annotations

import numpy as np
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend

from lfm2kit import specs
from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.weights import Weights


def test_a_norm_whose_sum_of_squares_overflows_is_not_zero() -> None:
    spec = specs.RMSNorm(64, 1e-5)
    norm = CpuSimdBackend(Context()).build(spec, Weights.of_arrays({"weight": np.ones(64)}))
    hidden = np.full((3, 64), [[1.0], [1e30], [2.0]], np.float32)
    _, x = norm(hidden, None)
    assert np.isnan(x[1]).all()
    assert np.isfinite(x[[0, 2]]).all()


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_a_head_whose_norm_overflows_is_not_zero(name: str) -> None:
    spec = specs.Attention(16, 2, 1, 8, 1e4, 1e-5)
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(shape) for n, shape in spec.parameters().items()}
    arrays[f"{name}.weight"] *= 1e30
    attention = CpuSimdBackend(Context()).build(spec, Weights.of_arrays(arrays))
    x = rng.standard_normal((3, 16), dtype=np.float32)
    assert np.isnan(attention(x, Batch.of_sequences([[1, 2, 3]]), None)).all()
