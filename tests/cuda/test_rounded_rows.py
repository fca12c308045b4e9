"""Experts take rows that another rank has rounded as they are: no kernel rounds them again."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.formats import BF16, F16, F32, Format
from lfm2kit.rewrites import StreamedExperts
from tests.cuda import late_cupy

EXPERTS = specs.Experts(64, 32, 4, 2, (0, 1, 2, 3))


class Loaded(SimpleNamespace):
    """The modules, and the names of the kernels that were launched."""

    launched: list[str]
    gemm16: Any
    gemm90: Any
    backend: Any
    activations: Any


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    names = ("gemm16", "gemm90", "backend", "activations")
    with late_cupy.loaded(*names) as modules:
        there = Loaded(launched=[], **dict(zip(names, modules, strict=True)))

        def kernel(stem: str, name: str, *more: Any, **constants: Any) -> Any:
            return lambda *arguments: there.launched.append(name)

        monkeypatch.setattr(there.activations, "load_kernel", kernel)
        yield there


@pytest.mark.parametrize("row_format", [BF16, F16], ids=str)
@pytest.mark.parametrize("has_source", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 24])
def test_rounded_rows_are_placed_and_float32_is_rounded(
    loaded: Loaded, row_format: Format, has_source: bool, tile_rows: int
) -> None:
    """On Hopper, kernels of few rows look up what the others have gathered before."""
    source = late_cupy.empty(24, np.int32) if has_source else None
    tiles = SimpleNamespace(source=source, tiling=SimpleNamespace(rows=tile_rows))
    for gemm, gathers in (
        (loaded.gemm16.TensorCoreGemm(row_format.name), has_source),
        (loaded.gemm90.HopperGemm(row_format.name), has_source and tile_rows > 16),
    ):
        for dtype, kernels in (
            (row_format.block, ["place_rows"]),
            (np.dtype(np.float32), [f"round_{row_format}", *(["gather"] * gathers)]),
        ):
            loaded.launched.clear()
            rounded = gemm.rounded(late_cupy.empty((17, 64), dtype))
            assert len(rounded) == 17
            slabs = gemm._slabs(rounded, tiles)
            assert loaded.launched == kernels
            assert len(slabs) == (24 if gathers else 17)


@pytest.mark.parametrize(
    ("precision", "row_format"),
    [("fp32", F32), ("bf16", BF16), ("fp16", F16), ("fp32x3", F32)],
)
def test_experts_alone_read_rows_in_the_format_of_the_precision(
    loaded: Loaded, precision: str, row_format: Format
) -> None:
    backend = object.__new__(loaded.backend.CudaBackend)
    backend._gemm = loaded.backend.arithmetic(precision)
    assert backend.row_format(EXPERTS) == row_format
    assert backend.row_format(StreamedExperts(EXPERTS, 0, 2, 1)) == row_format
    assert backend.row_format(specs.MLP(64, 32)) == F32
