"""The cpu_simd backend: SIMD kernels in Numba.  Nothing heavy is imported before `create`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import lfm2kit
from lfm2kit.backend import FP32, FP32_GRADE, Backend, BackendPlugin, Context, Grade, Precision

# Matrices are rounded, and kernels multiply what is left of them in float32.
BF16_WEIGHTS = Grade("BF16 weights", FP32_GRADE.block_error, "top-1", block_nmse=1e-4)
F16_WEIGHTS = Grade("F16 weights", FP32_GRADE.block_error, "top-1", block_nmse=2e-6)


def _create(context: Context) -> Backend:
    from lfm2kit_cpu_simd.compile_steps import tell_compile_steps

    tell_compile_steps()  # before the next line, which compiles
    from lfm2kit_cpu_simd.backend import CpuSimdBackend

    return CpuSimdBackend(context)


def _why_unavailable() -> str | None:
    return None if find_spec("numba") else "numba is not installed; pip install numba"


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="cpu_simd",
        summary="SIMD kernels in Numba, on all cores",
        create=_create,
        api_version=1,
        why_unavailable=_why_unavailable,
        precisions=(FP32, Precision("bf16", BF16_WEIGHTS), Precision("fp16", F16_WEIGHTS)),
        preference=50,
    )
