"""Announces a reader and a backend of int8 weights.  Importing this is free."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import lfm2kit
from lfm2kit.backend import FP32_GRADE, Backend, BackendPlugin, Context, Grade, Precision
from lfm2kit_int8.reader import open_folder, recognises

# Kernels multiply the rounded weights in float32.  llama.cpp allows its products the same 5e-4.
Q8 = Precision("q8", Grade("8-bit weights", FP32_GRADE.block_error, "top-1", block_nmse=5e-4))


def _create(context: Context) -> Backend:
    from lfm2kit_int8.backend import Int8Backend

    return Int8Backend(context)


def _why_unavailable() -> str | None:
    return None if find_spec("numba") else "numba is not installed; pip install numba"


@lfm2kit.hookimpl
def lfm2kit_checkpoints() -> Iterator[lfm2kit.CheckpointReader]:
    summary = "matrices in int8, with a scale for each row"
    yield lfm2kit.CheckpointReader("int8", summary, recognises, open_folder)


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="int8",
        summary="feed-forwards of int8 weights, in Numba",
        create=_create,
        api_version=1,
        why_unavailable=_why_unavailable,
        precisions=(Q8,),
    )
