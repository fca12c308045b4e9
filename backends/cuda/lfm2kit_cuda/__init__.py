"""The cuda backend: CUDA C++ kernels.  Nothing heavy is imported before `create`."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit
from lfm2kit.backend import (
    BF16,
    BF16_GRADE,
    FP16_GRADE,
    FP32,
    FP32_GRADE,
    Backend,
    BackendPlugin,
    Context,
    Precision,
)


def _create(context: Context) -> Backend:
    from lfm2kit_cuda.backend import CudaBackend

    return CudaBackend(context)


def _why_unavailable() -> str | None:
    from lfm2kit_cuda.requirements import why_unavailable

    return why_unavailable()


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="cuda",
        summary="CUDA C++ kernels on an NVIDIA GPU",
        create=_create,
        api_version=1,
        why_unavailable=_why_unavailable,
        precisions=(
            FP32,
            Precision("bf16", BF16_GRADE),
            Precision("fp16", FP16_GRADE),
            Precision("fp32x3", FP32_GRADE, weights=BF16),
        ),
        preference=100,
    )
