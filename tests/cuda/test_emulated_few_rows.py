"""The products of few rows on the CPU: the bits of cpu_simd, whose order of sums they share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cpu_simd import gemm as cpu_simd
from lfm2kit_cpu_simd import packing
from lfm2kit_cuda.compiling import definitions
from lfm2kit_cuda.constants import GEMM

from lfm2kit.weights import Tensor
from tests.cpu_simd.twins import HAS_FMA, assert_same_bits
from tests.cuda.emulating import compiled_program, sources_in
from tests.cuda.test_emulated import (
    MARGIN,
    Float32,
    Tiles,
    framed,
    listed,
    normal,
    pack,
    pack_gated,
    padded,
    width,
)
from tests.cuda.test_grouping import grouped

MOST, STEP = 8, GEMM.STEP
STAGES = 3  # of a warp: few, so that they wrap
COUNTS = (1, 7, 8, 0, 9, 2, 17, 4)  # rows of groups, astride the edges of tiles

pytestmark = pytest.mark.skipif(not HAS_FMA, reason="the CPU has no fused multiply-adds")


@dataclass(frozen=True)
class Emulated:
    """The products as few_rows.py launches them."""

    program: Path
    rows: int  # of a tile
    vector: int

    def linear(
        self,
        x: Float32,
        packed: Float32,
        columns: int,
        bias: Float32 | None = None,
        tiles: Tiles | None = None,
        source: npt.NDArray[np.int32] | None = None,
    ) -> Float32:
        return self._run("linear_few", x, packed, (bias,), columns, tiles, source)

    def gated(
        self,
        x: Float32,
        packed: Float32,
        columns: int,
        tiles: Tiles | None = None,
        source: npt.NDArray[np.int32] | None = None,
    ) -> Float32:
        return self._run("gated_few", x, packed, (), padded(columns, STEP), tiles, source)

    def _run(
        self,
        name: str,
        x: Float32,
        packed: Float32,
        more: tuple[Float32 | None, ...],
        columns: int,
        tiles: Tiles | None,
        source: npt.NDArray[np.int32] | None,
    ) -> Float32:
        assert x.shape[1] % self.vector == 0
        dense = len(x), -(-len(x) // self.rows)
        rows, most = (len(tiles.source), len(tiles.tiles) + 1) if tiles else dense
        output = np.full(rows * columns + MARGIN, np.nan, np.float32)
        are_known = int(source is None)
        numbers = are_known, len(x), x.shape[1], packed.shape[2], width(packed), columns
        grid = width(packed) // (64 if name == "gated_few" else 32), most
        given = (x, source, packed, *more, output, *listed(tiles))
        done = subprocess.run(
            [str(self.program), name, *map(str, (*grid, *numbers))],
            input=b"".join(map(framed, given)), stdout=subprocess.PIPE, check=True, timeout=100,
        )  # fmt: skip
        written = np.frombuffer(done.stdout, np.float32)
        assert np.isnan(written[rows * columns :]).all()
        return written[: rows * columns].reshape(rows, columns)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """Return the kernels by the rows of a tile and the floats of a copy."""
    folder = tmp_path_factory.mktemp("few_rows")
    sources = sources_in(folder)

    @cache
    def compiled(rows: int, vector: int) -> Emulated:
        constants = {"ROWS": rows, "TEAM": max(1, rows // 4), "STAGES": STAGES, "VECTOR": vector}
        program = folder / "-".join(map(str, constants.values()))
        compiled_program(sources, "few_rows", definitions("few_rows", constants), program)
        return Emulated(program, rows, vector)

    return compiled


def tensor(matrix: Float32) -> Tensor:
    return Tensor.of_array("w", matrix)


@pytest.mark.parametrize(
    ("of_tile", "rows", "inputs", "vector"),
    [
        (1, 1, 16, 4),
        (4, 7, 107, 1),
        (8, 1, 300, 4),
        (8, 5, 224, 4),
        (8, 8, 2048, 4),
        (8, 17, 288, 4),
    ],
)
def test_dense_rows(
    emulated: Callable[..., Emulated],
    rng: np.random.Generator,
    of_tile: int,
    rows: int,
    inputs: int,
    vector: int,
) -> None:
    """A gated product, and one that reads its result."""
    few, inner = emulated(of_tile, vector), 69
    x, gates, ups = (normal(rng, n, inputs) for n in (rows, inner, inner))
    down, bias = normal(rng, 101, inner), normal(rng, 101)
    got = few.gated(x, pack_gated(gates[None], ups[None]), inner)
    want = cpu_simd.linear(x, packing.pack_gated([tensor(gates)], [tensor(ups)]), inner)
    assert_same_bits(got[:, :inner], want)
    assert not got[:, inner:].any()
    out = few.linear(got, pack(down[None]), 101, bias)
    assert_same_bits(out, cpu_simd.linear(want, packing.pack([[tensor(down)]]), 101, bias))


def test_experts(emulated: Callable[..., Emulated], rng: np.random.Generator) -> None:
    """Tiles of a list, gathered; the next product reads them where they are."""
    few, inner, inputs, tokens = emulated(MOST, 4), 69, 108, 30
    group_of = np.repeat(np.arange(len(COUNTS), dtype=np.int32), COUNTS)
    slots, place, of_tiles = grouped(group_of[:, None], range(len(COUNTS)), MOST, step=1)
    slots[place] = rng.integers(0, tokens, len(group_of), np.int32)
    tiles = Tiles(slots, of_tiles, np.full(len(slots), -1, np.int32))
    assert tiles.tiles[:, 2].max() <= MOST
    x, gates, ups, down = (
        normal(rng, *shape)
        for shape in (
            (tokens, inputs),
            *[(len(COUNTS), inner, inputs)] * 2,
            (len(COUNTS), 101, inner),
        )
    )
    got = few.gated(x, pack_gated(gates, ups), inner, tiles, slots)
    out = few.linear(got, pack(down), 101, None, tiles)
    for row, group in zip(place, group_of, strict=True):
        w13 = packing.pack_gated([tensor(gates[group])], [tensor(ups[group])])
        want = cpu_simd.linear(x[slots[row]][None], w13, inner)
        assert_same_bits(got[row : row + 1, :inner], want)
        w2 = packing.pack([[tensor(down[group])]])
        assert_same_bits(out[row : row + 1], cpu_simd.linear(want, w2, 101))
    nobodys = np.setdiff1d(np.arange(len(slots)), place)
    assert np.isnan(out[nobodys]).all()
    assert np.isnan(got[nobodys]).all()


def test_a_sum_that_is_zero_is_positive(emulated: Callable[..., Emulated]) -> None:
    """Though each chain is -0, because its terms are too small for float32, and so is the bias."""
    k = STEP * GEMM.GROUPS
    x, weight = np.full((1, k), -1e-30, np.float32), np.full((1, 1, k), 1e-30, np.float32)
    got = emulated(MOST, 4).linear(x, pack(weight), 1, np.full(1, -0.0, np.float32))
    assert_same_bits(got, np.zeros((1, 1), np.float32))
