"""The 16-bit products of few rows on Hopper, on the CPU: where each sum comes from and goes to.

The instructions that multiply, barriers and copies are emulated.  Values are such that every order
of the sums gives the same bits.  In FP16: BF16 differs only in conversions.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.constants import FEW_ROWS90, GEMM90, SLABS

from lfm2kit.formats import F16, rounded
from tests.cuda import late_cupy
from tests.cuda.emulated_operators import compiled
from tests.cuda.test_compiling import HALVES
from tests.cuda.test_emulated import Tiles, framed, listed, padded
from tests.cuda.test_emulated_activations import in_rows
from tests.cuda.test_grouping import grouped

PANEL, SLAB, BLOCK, STEP = GEMM90.PANEL, SLABS.SLAB, FEW_ROWS90.BLOCK, GEMM90.STEP
SHARED_BYTES = 96 * 1024  # for four stages of the largest kind, and more
MARGIN = 1000  # elements behind an output, which are to stay as they are
COUNTS = (1, 7, 16, 0, 9, 2, 40, 8)  # rows of groups, astride the edges of tiles

Float32 = npt.NDArray[np.float32]
Halves = npt.NDArray[Any]


def integers(rng: np.random.Generator, *shape: int) -> Float32:
    return rng.integers(-2, 3, shape).astype(np.float32)


def in_slabs(rows: Halves, extent: int) -> Halves:
    """Return rows as slabs of `extent` rows: the twin of slabs.cuh."""
    room = np.zeros((extent, padded(rows.shape[1], SLAB)), rows.dtype)
    room[: len(rows), : rows.shape[1]] = rows
    chunks = SLAB // SLABS.CHUNK
    parts = room.reshape(extent, -1, chunks, SLABS.CHUNK).transpose(1, 0, 2, 3)
    numbers, places = np.arange(extent)[:, None], np.arange(chunks)
    return np.ascontiguousarray(parts[:, numbers, places ^ numbers % chunks])


def packed(matrices: Halves) -> Halves:
    """Pack as `panel` in packing.cu does: [groups, panels, steps, PANEL, SLAB]."""
    groups, columns, inputs = matrices.shape
    room = np.zeros((groups, padded(columns, PANEL), inputs), matrices.dtype)
    room[:, :columns] = matrices
    row = np.arange(PANEL)
    place = (row // 128 * 2 + row // 2 % 2) * 64 + row // 32 % 4 * 16 + row % 2 * 8 + row // 4 % 8
    panels = room.reshape(groups, -1, PANEL, inputs)[:, :, np.argsort(place)]
    return np.array([[in_slabs(panel, PANEL) for panel in group] for group in panels])


def interleaved(gates: Halves, ups: Halves) -> Halves:
    groups, columns, inputs = gates.shape
    return np.stack([gates, ups], axis=2).reshape(groups, 2 * columns, inputs)


@dataclass(frozen=True)
class Emulated:
    """The products as few_rows90.py launches them, by CTAs that take several tiles each."""

    program: Path
    blocks: int

    def linear(
        self,
        x: Float32,
        matrices: Float32,
        bias: Float32 | None = None,
        tiles: Tiles | None = None,
        dtype: Any = np.float32,
    ) -> npt.NDArray[Any]:
        rows, columns = len(tiles.source) if tiles else len(x), matrices.shape[1]
        out = np.full(rows * columns + MARGIN, -1, np.dtype(f"i{np.dtype(dtype).itemsize}"))
        name = "linear_few_mma" if dtype is np.float32 else "linear_rounded_few_mma"
        written = self._run(name, x, matrices, (bias, out), tiles, columns)
        assert (written.view(out.dtype)[rows * columns :] == -1).all()
        return written.view(dtype)[: rows * columns].reshape(rows, columns)

    def gated(
        self,
        x: Float32,
        gates: Float32,
        ups: Float32,
        tiles: Tiles | None = None,
    ) -> Halves:
        """Return rows with padding; the bits of those that nobody wrote are those of -1."""
        columns, extent = (
            padded(gates.shape[1], SLAB),
            padded(len(tiles.source if tiles else x), 16),
        )
        out = np.full(columns * extent, -1, np.int16)
        matrices = interleaved(gates, ups)
        written = self._run("gated_few_mma", x, matrices, (out,), tiles, columns, extent)
        return in_rows(written.view(np.uint16), extent).view(np.float16)

    def _run(
        self,
        name: str,
        x: Float32,
        matrices: Float32,
        outputs: tuple[npt.NDArray[Any] | None, ...],
        tiles: Tiles | None,
        columns: int,
        *extents: int,
    ) -> npt.NDArray[np.uint8]:
        weights, x_extent = packed(rounded(matrices, F16)), padded(len(x), 16)
        most = tiles.tiles[:, 2].max() if tiles else len(x)
        stage = 2 * SLAB * (BLOCK * self.blocks + padded(most, STEP))
        source = tiles.source if tiles and len(x) != len(tiles.source) else None
        are_known = source is None
        numbers = (
            are_known, len(tiles.tiles) + 1 if tiles else 1, len(x), x_extent, weights.shape[2],
            weights.shape[1] * PANEL, columns, self.blocks, True,
            min(SHARED_BYTES // stage, 5), stage, *extents,
        )  # fmt: skip
        given = in_slabs(rounded(x, F16), x_extent), source, weights, *outputs
        done = subprocess.run(
            [str(self.program), name, *map(str, map(int, (3, *numbers)))],
            input=b"".join(map(framed, (*given, *listed(tiles)))), stdout=subprocess.PIPE,
            check=True, timeout=100,
        )  # fmt: skip
        return np.frombuffer(done.stdout, np.uint8)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Emulated]:
    """Return the kernels, launched for CTAs of this many blocks of columns."""
    folder = tmp_path_factory.mktemp("few_rows90")
    program = compiled(folder, "few_rows90", **HALVES["fp16"], SHARED_BYTES=SHARED_BYTES)
    return lambda blocks: Emulated(program, blocks)


def swiglu(x: Float32, gates: Float32, ups: Float32) -> Float32:
    gate = (x @ gates.T).astype(np.float64)
    wanted: Float32 = (gate / (1 + np.exp(-gate)) * (x @ ups.T) / 64).astype(np.float32)
    return wanted


def assert_near(got: Halves, wanted: Float32) -> None:
    assert (abs(got - wanted) <= 2.0**-10 * abs(wanted) + 1e-6).all()  # false for NaN as well


@pytest.mark.parametrize(
    ("rows", "inputs", "columns", "blocks"),
    [
        (1, 64, 101, 1), (2, 300, 33, 3), (7, 69, 300, 4), (8, 640, 257, 5), (9, 200, 512, 7),
        (16, 320, 100, 8),
    ],
)  # fmt: skip
def test_dense_rows(
    emulated: Callable[[int], Emulated],
    rng: np.random.Generator,
    rows: int,
    inputs: int,
    columns: int,
    blocks: int,
) -> None:
    few, x, w = emulated(blocks), integers(rng, rows, inputs), integers(rng, columns, inputs)
    bias = integers(rng, columns)
    np.testing.assert_array_equal(few.linear(x, w[None], bias), x @ w.T + bias)
    np.testing.assert_array_equal(few.linear(x, w[None], dtype=np.float16), rounded(x @ w.T, F16))
    gates, ups = integers(rng, 2, columns // 2, inputs) / 4
    gated = few.gated(x, gates[None], ups[None])
    assert_near(gated[:rows, : columns // 2], swiglu(x, gates, ups))
    assert not gated[:rows, columns // 2 :].any()
    assert (gated[rows:].view(np.int16) == -1).all()


@pytest.mark.parametrize(("most", "blocks"), [(8, 3), (16, 8)])
def test_experts(
    emulated: Callable[[int], Emulated], rng: np.random.Generator, most: int, blocks: int
) -> None:
    """Tiles of a list, whose rows are looked up or in its order."""
    few, inner, inputs, tokens = emulated(blocks), 69, 108, 30
    group_of = np.repeat(np.arange(len(COUNTS), dtype=np.int32), COUNTS)
    slots, place, of_tiles = grouped(group_of[:, None], range(len(COUNTS)), most, STEP)
    slots[place] = rng.integers(0, tokens, len(group_of), np.int32)
    tiles = Tiles(slots, of_tiles, np.full(len(slots), -1, np.int32))
    x, xs = integers(rng, tokens, inputs), integers(rng, len(slots), inner)
    gates, ups = integers(rng, 2, len(COUNTS), inner, inputs) / 4
    down = integers(rng, len(COUNTS), 101, inner)
    gated, out = few.gated(x, gates, ups, tiles), few.linear(xs, down, None, tiles)
    for row, group in zip(place, group_of, strict=True):
        want = swiglu(x[slots[row]][None], gates[group], ups[group])
        assert_near(gated[row : row + 1, :inner], want)
        np.testing.assert_array_equal(out[row], xs[row] @ down[group].T)
    nobodys = np.setdiff1d(np.arange(len(slots)), place)
    assert (gated[nobodys].view(np.int16) == -1).all()
    assert (out[nobodys].view(np.int32) == -1).all()


@pytest.fixture
def few_rows90() -> Iterator[Any]:
    with late_cupy.loaded("few_rows90") as (module,):
        yield module


@pytest.mark.parametrize("ctas", [132, 133])
@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("blocks", range(1, FEW_ROWS90.MOST_BLOCKS + 1))
def test_stages_fit_and_each_warp_that_copies_has_one(
    few_rows90: Any, blocks: int, rows: int, ctas: int
) -> None:
    shared_bytes = few_rows90.shared_bytes(ctas, 1, sm_count=132)
    count, stage = few_rows90.stages(blocks, rows, shared_bytes)
    assert count * stage <= shared_bytes
    assert count >= FEW_ROWS90.COPYING_WARPS, "a warp would take one phase of a barrier for another"


@pytest.mark.parametrize(
    ("ctas", "tiles", "most"), [(132, 1, 2), (133, 1, 1), (128, 4, 2), (128, 8, 1)]
)
def test_ctas_that_may_end_at_different_times_share_no_multiprocessor(
    few_rows90: Any, ctas: int, tiles: int, most: int
) -> None:
    of_an_sm = 228 * 1024  # a Hopper's
    assert of_an_sm // few_rows90.shared_bytes(ctas, tiles, sm_count=132) == most


@pytest.mark.parametrize(
    ("blocks", "tiles", "wanted"),
    [(128, 1, 1), (192, 1, 2), (384, 1, 3), (448, 1, 4), (4096, 1, 8), (224, 4, 7), (128, 4, 4)],
)
def test_the_busiest_of_132_multiprocessors_gets_few_blocks(
    few_rows90: Any, blocks: int, tiles: int, wanted: int
) -> None:
    assert few_rows90.blocks_of_a_cta(blocks, tiles, 132) == wanted
