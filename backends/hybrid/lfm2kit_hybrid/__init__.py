"""The hybrid backend: GPU blocks, with the choice of experts on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit
from lfm2kit.backend import (
    BF16_GRADE,
    FP16_GRADE,
    FP32,
    Backend,
    BackendPlugin,
    Context,
    Precision,
)


def _create(context: Context) -> Backend:
    from lfm2kit_hybrid.backend import HybridBackend

    return HybridBackend(context)


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="hybrid",
        summary="GPU blocks, with the choice of experts on the CPU",
        create=_create,
        api_version=1,
        precisions=(FP32, Precision("bf16", BF16_GRADE), Precision("fp16", FP16_GRADE)),
    )
