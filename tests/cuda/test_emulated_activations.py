"""The kernels that round rows, or place rounded ones, on the CPU: the bits that ranks send."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.constants import SLABS

from lfm2kit.formats import BF16, F16, Format, rounded
from tests.core.test_formats import EDGES
from tests.cuda.emulated_operators import compiled

SHAPES = ((7, 13), (16, 64), (5, 72), (3, 136))  # rows, columns: some are whole chunks


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("activations"), "activations")


def in_rows(slabs: npt.NDArray[np.uint16], extent: int) -> npt.NDArray[np.uint16]:
    """Return the rows of slabs, with their padding: the twin of slabs.cuh."""
    chunk, chunks = SLABS.CHUNK, SLABS.SLAB // SLABS.CHUNK
    parts = slabs.reshape(-1, extent, chunks, chunk)
    rows, places = np.arange(extent)[:, None], np.arange(chunks)
    straight = parts[:, rows, places ^ rows % chunks]
    return straight.transpose(1, 0, 2, 3).reshape(extent, -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", [BF16, F16], ids=str)
def test_rows_are_rounded_and_placed_with_the_bits_that_ranks_send(
    activations: Path, format: Format, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    rng, extent = np.random.default_rng(rows), 32
    x = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    x.reshape(-1)[: len(EDGES)] = EDGES
    source = rng.integers(-1, rows, 20).astype(np.int32)
    want = rounded(x, format).view(np.uint16)
    arrays: list[Any] = [x, want, source]
    numbers = [format.name, rows, columns, len(source), extent, 8]
    done = subprocess.run(
        [str(activations), *map(str, numbers)], input=b"".join(a.tobytes() for a in arrays),
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    all_slabs = np.split(np.frombuffer(done.stdout, np.uint16), 3)
    made, placed, picked = (in_rows(slabs, extent) for slabs in all_slabs)
    np.testing.assert_array_equal(made[:rows, :columns], want)
    np.testing.assert_array_equal(placed, made)
    poison, is_there = 0xFFFF, source >= 0
    np.testing.assert_array_equal(picked[:20][is_there], made[source[is_there]])
    assert (picked[:20][~is_there] == poison).all()
    assert not made[:rows, columns:].any()
    assert (made[rows:] == poison).all()
