"""Announces the backend `blas`.  Importing this is free: the work is in `lfm2kit_blas.backend`."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit
from lfm2kit.backend import Backend, BackendPlugin, Context, Promise


def _create(context: Context) -> Backend:
    from lfm2kit_blas.backend import BlasBackend

    return BlasBackend(context)


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="blas",
        summary="the dense blocks through NumPy's BLAS: a peer to race kernels against",
        create=_create,
        api_version=1,
        preference=0,  # not batch invariant, so never what `auto` stands for
        not_promised={
            Promise.BATCH_INVARIANCE: "BLAS picks its kernel, and with it the order of a sum, by "
            "the number of rows"
        },
    )
