"""Where activations are left for products, on a real GPU, against a NumPy twin of slabs.cuh."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit import formats
from lfm2kit.formats import BF16, F16, Format
from tests.core.test_formats import EDGES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

SHAPES = ((1, 1), (7, 13), (16, 64), (17, 72), (33, 200))  # rows, columns


def rows_of(slabs: Any) -> npt.NDArray[np.uint16]:
    """Return the rows of slabs: [terms, rows, columns with padding]."""
    array = slabs.array.get()
    terms, count, extent, k = array.shape
    chunks = array.reshape(terms, count, extent, 8, 8)
    rows, places = np.arange(extent)[:, None], np.arange(8)[None]
    straight = chunks[:, :, rows, places ^ rows % 8]
    return straight.transpose(0, 2, 1, 3, 4).reshape(terms, extent, count * k)[:, : len(slabs)]


@pytest.mark.parametrize("format", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded(format: Format, shape: tuple[int, int]) -> None:
    import cupy
    from lfm2kit_cuda.activations import rounded

    x = np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    x.reshape(-1)[: len(EDGES)] = EDGES[: x.size]
    (got,) = rows_of(rounded(cupy.asarray(x), format.name))
    want = formats.rounded(x, format).view(np.uint16)
    assert np.array_equal(got[:, : shape[1]], want)
    assert not got[:, shape[1] :].any()


@pytest.mark.parametrize("format", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_placed(format: Format, shape: tuple[int, int]) -> None:
    import cupy
    from lfm2kit_cuda.activations import placed

    rng = np.random.default_rng(0)
    x = formats.rounded(rng.standard_normal(shape, dtype=np.float32), format)
    for source in (None, rng.integers(-1, shape[0], 50, np.int32)):
        there = None if source is None else cupy.asarray(source)
        (got,) = rows_of(placed(cupy.asarray(x), there))
        rows = np.arange(len(x)) if source is None else source
        assert np.array_equal(got[rows >= 0, : shape[1]], x.view(np.uint16)[rows[rows >= 0]])
        assert not got[rows >= 0, shape[1] :].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_gathered(shape: tuple[int, int]) -> None:
    import cupy
    from lfm2kit_cuda.activations import gathered, rounded

    rng = np.random.default_rng()
    slabs = rounded(cupy.asarray(rng.standard_normal(shape, dtype=np.float32)), "BF16")
    source = rng.integers(-1, shape[0], 50, np.int32)
    got, want = rows_of(gathered(slabs, cupy.asarray(source))), rows_of(slabs)
    assert np.array_equal(got[:, source >= 0], want[:, source[source >= 0]])


@pytest.mark.parametrize("shape", SHAPES)
def test_three_terms_add_up_to_the_bit(shape: tuple[int, int]) -> None:
    import cupy
    from lfm2kit_cuda.activations import split

    rng = np.random.default_rng()
    x = rng.standard_normal(shape, dtype=np.float32)
    for source in (None, rng.integers(-1, shape[0], 50, np.int32)):
        slabs = split(cupy.asarray(x), None if source is None else cupy.asarray(source))
        rows = np.arange(len(x)) if source is None else source
        terms = rows_of(slabs)[:, rows >= 0].astype(np.uint32) << 16
        got = terms.view(np.float32).astype(np.float64).sum(0)
        assert np.array_equal(got[:, : shape[1]], x[rows[rows >= 0]])
        assert not got[:, shape[1] :].any()
