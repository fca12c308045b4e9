"""The kernels of the FP32 product on the CPU, where CUDA threads take turns, against float64.

So what is most easily wrong in them (indices, the ring of stages, the reduction, lists of tiles,
what is stored where) is checked on machines without a GPU too.  Bulk copies and their barriers
(from sm_90 on) are not: stages are filled as on older chips.  Every array that a kernel writes is
full of NaN before, and every element of it is looked at.
"""

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
from lfm2kit_cuda.constants import GEMM, HEIGHTS, PANELS

from lfm2kit.weights import Tensor
from tests.cpu_simd.twins import HAS_FMA, assert_same_bits
from tests.cuda.emulating import compiled_program, sources_in
from tests.cuda.test_grouping import even, grouped

HOPPER, AMPERE, TURING = (16, 4), (8, 2), (4, 2)  # k of a stage, and rows added at once: gemm.py
WIDTH, RUN, STEP, PART = GEMM.WIDTH, GEMM.RUN, GEMM.STEP, PANELS.PART
TALLEST, LOWEST, HEIGHT_STEP = HEIGHTS.TALLEST, HEIGHTS.LOWEST, HEIGHTS.HEIGHT_STEP
ALL_HEIGHTS = range(LOWEST, TALLEST + 1, HEIGHT_STEP)
MARGIN = 1000  # elements behind an output, which are to stay as they are
ROUNDING = 2.0**-24

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Judged = tuple[Float64, Float64]  # what is expected, and the most that a result may be off


@dataclass(frozen=True)
class Tiles:
    """A list of tiles as `RowTiles`; group_of holds the group of each row, -1 if there is none."""

    source: Ints
    tiles: Ints
    group_of: Ints

    @property
    def filled(self) -> npt.NDArray[np.intp]:
        return np.flatnonzero(self.group_of >= 0)


@dataclass(frozen=True)
class Emulated:
    """A product as gemm.py launches it, by CTAs that take several tiles each."""

    program: Path

    def arrange(self, x: Float32, tiles: Tiles | None = None, height: int = TALLEST) -> Float32:
        """Arrange tiles as a list says, or evenly, of at most `height` rows."""
        rows, inputs = len(tiles.source) if tiles else len(x), padded(x.shape[1], STEP)
        most = len(tiles.tiles) + 1 if tiles else -(-rows // height)
        source = tiles.source if tiles else None
        return self._run(
            "arrange", (-(-inputs // PART), -(-most // 3), 3), (rows, most, x.shape[1], inputs),
            (x, source, None, *listed(tiles)), (most, inputs, TALLEST),
        )  # fmt: skip

    def linear(
        self,
        panels: Float32,
        packed: Float32,
        rows: int,
        columns: int,
        bias: Float32 | None = None,
        tiles: Tiles | None = None,
        blocks: int = 2,
    ) -> Float32:
        return self._run(
            "linear_simt", (blocks, 1, 1),
            (rows, len(panels), panels.shape[1], width(packed), columns),
            (panels, packed, bias, None, *listed(tiles)), (rows, columns), output=3,
        )  # fmt: skip

    def gated(
        self,
        panels: Float32,
        packed: Float32,
        rows: int,
        columns: int,
        tiles: Tiles | None = None,
        blocks: int = 2,
    ) -> Float32:
        shape = (len(panels), padded(columns, STEP), TALLEST)
        return self._run(
            "gated_simt", (blocks, 1, 1),
            (rows, len(panels), panels.shape[1], width(packed), shape[1]),
            (panels, packed, None, *listed(tiles)), shape,
        )  # fmt: skip

    def _run(
        self,
        name: str,
        grid: tuple[int, int, int],
        numbers: tuple[int, ...],
        arrays: tuple[npt.NDArray[np.generic] | None, ...],
        shape: tuple[int, ...],
        output: int = 2,
    ) -> Float32:
        size = int(np.prod(shape))
        poisoned = np.full(size + MARGIN, np.nan, np.float32)
        given = [poisoned if i == output else a for i, a in enumerate(arrays)]
        done = subprocess.run(
            [str(self.program), name, *map(str, (*grid, *numbers))],
            input=b"".join(map(framed, given)), stdout=subprocess.PIPE, check=True, timeout=100,
        )  # fmt: skip
        written = np.frombuffer(done.stdout, np.float32)
        assert np.isnan(written[size:]).all()
        return written[:size].reshape(shape)


def ranges(panels: Float32, rows: int, tiles: Tiles | None) -> list[tuple[int, int]]:
    """Return the first row and the rows of each tile."""
    if tiles:
        return [(int(first), int(many)) for _, first, many, _ in tiles.tiles]
    sizes = [HEIGHT_STEP * steps for steps in even(-(-rows // HEIGHT_STEP), len(panels))]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(first, min(size, rows - first)) for first, size in zip(firsts, sizes, strict=True)]


def content(panel: Float32, rows: int) -> Float32:
    """Return [k, height] of a tile with `rows` rows; nothing was written after it."""
    height = max(LOWEST, padded(rows, HEIGHT_STEP))
    written = panel.reshape(-1)[: len(panel) * height]
    assert np.isfinite(written).all()
    assert np.isnan(panel.reshape(-1)[len(written) :]).all()
    return written.reshape(-1, height)


def rows_of(panels: Float32, rows: int, tiles: Tiles | None = None) -> Float32:
    """Return panels as rows again: [rows, k]."""
    out = np.full((rows, panels.shape[1]), np.nan, np.float32)
    for panel, (first, many) in zip(panels, ranges(panels, rows, tiles), strict=False):
        out[first : first + many] = content(panel, many).T[:many]
    return out


def framed(array: npt.NDArray[np.generic] | None) -> bytes:
    content = b"" if array is None else array.tobytes()
    return len(content).to_bytes(8, "little") + content


def listed(tiles: Tiles | None) -> tuple[Ints | None, Ints | None]:
    """Return the list, with space for one more tile, and its length."""
    if tiles is None:
        return None, None
    more = np.full((1, 4), -1, np.int32)
    return np.concatenate([tiles.tiles, more]), np.array([len(tiles.tiles)], np.int32)


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def width(packed: Float32) -> int:
    return packed.shape[1] * WIDTH


def pack(matrices_gnk: Float32) -> Float32:
    """Pack as `Gemm.pack` does: groups, panels, k, columns."""
    groups, columns, inputs = matrices_gnk.shape
    room = np.zeros((groups, padded(columns, WIDTH), padded(inputs, STEP)), np.float32)
    room[:, :columns, :inputs] = matrices_gnk
    return np.ascontiguousarray(room.reshape(groups, -1, WIDTH, room.shape[2]).swapaxes(2, 3))


def pack_gated(gates_gnk: Float32, ups_gnk: Float32) -> Float32:
    groups, columns, inputs = gates_gnk.shape
    room = np.zeros((groups, 2, padded(columns, RUN), inputs), np.float32)
    room[:, 0, :columns], room[:, 1, :columns] = gates_gnk, ups_gnk
    runs = room.reshape(groups, 2, -1, RUN, inputs).swapaxes(1, 2)
    return pack(runs.reshape(groups, -1, inputs))


def product(x: Float32, matrices_gnk: Float32, group_of: Ints) -> Judged:
    """Return the product of rows and their groups' matrices, and a bound of its rounding."""
    x64, w64 = x.astype(np.float64), matrices_gnk.astype(np.float64)[group_of]
    want = np.einsum("mk,mnk->mn", x64, w64)
    size = np.einsum("mk,mnk->mn", abs(x64), abs(w64))
    return want, (x.shape[1] + 8) * ROUNDING * size


def gated_product(x: Float32, gates: Float32, ups: Float32, group_of: Ints) -> Judged:
    (gate, gate_off), (up, up_off) = product(x, gates, group_of), product(x, ups, group_of)
    silu = gate / (1 + np.exp(-gate))
    off = 1.1 * gate_off * (abs(up) + up_off) + abs(silu) * up_off  # 1.1: the slope of silu
    return silu * up, off + 16 * ROUNDING * abs(silu * up)


def assert_near(got: Float32, judged: Judged) -> None:
    want, off = judged
    assert got.shape == want.shape
    assert (abs(got - want) <= off).all()  # false for NaN as well


def tiles_of(rng: np.random.Generator, counts: tuple[int, ...], tokens: int) -> Tiles:
    """Return tiles of groups with `counts` rows, gathered from `tokens` tokens, with repeats."""
    group_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    local = range(len(counts))
    slots, place, tiles = grouped(group_of[:, None], local, TALLEST, HEIGHT_STEP, by_height=True)
    listed = Tiles(slots, tiles, np.full(len(slots), -1, np.int32))
    listed.source[place] = rng.integers(0, tokens, len(group_of), np.int32)
    listed.group_of[place] = group_of
    return listed


def normal(rng: np.random.Generator, *shape: int) -> Float32:
    return rng.standard_normal(shape).astype(np.float32) / np.float32(2)


# Rows of groups: astride the edges of tiles of all heights, and one with none.
COUNTS = (1, 15, 16, 17, 0, 24, 25, 33, 40, 41, 47, 48, 49, 100)


def of_one_group(rows: int) -> Ints:
    return np.zeros(rows, np.int32)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """Return a kernel by its sizes, compiled from headers of which some are replaced."""
    folder = tmp_path_factory.mktemp("emulated")
    sources = sources_in(folder)

    @cache
    def compiled(sizes: tuple[int, int] = HOPPER) -> Emulated:
        constants = {"TILE_K": sizes[0], "PASS": sizes[1]}
        program = folder / "-".join(map(str, ("products", *constants.values())))
        defined = [*definitions("gemm", constants), *definitions("panels", {})]
        return Emulated(compiled_program(sources, "products", defined, program))

    return compiled


def test_panels(emulated: Callable[..., Emulated], rng: np.random.Generator) -> None:
    gemm, x = emulated(), normal(rng, 29, 70)
    tiles = tiles_of(rng, COUNTS, len(x))
    panels = gemm.arrange(x, tiles)
    assert np.isnan(panels[-1]).all()  # of the tile that is not in the list
    for panel, (_, first, many, _) in zip(panels, tiles.tiles, strict=False):
        panel_kr = content(panel, many)
        rows = tiles.source[first + np.minimum(np.arange(panel_kr.shape[1]), many - 1)]
        assert np.array_equal(panel_kr[:70], x[rows].T)
        assert not panel_kr[70:].any()


@pytest.mark.parametrize("height", ALL_HEIGHTS)
def test_linear_of_dense_rows(
    emulated: Callable[..., Emulated], rng: np.random.Generator, height: int
) -> None:
    """With few k most of a block's groups have nothing to sum."""
    gemm = emulated()
    shapes = [(132, 16), (37, 32), (132, 107), (129, 300)]  # columns, inputs
    for i, rows in enumerate((1, 17, height - 1, 2 * height + 1)):
        columns, inputs = shapes[i]
        x, weight = normal(rng, rows, inputs), normal(rng, 1, columns, inputs)
        bias = normal(rng, columns) if i >= 2 else None
        panels = gemm.arrange(x, height=height)
        got = gemm.linear(panels, pack(weight), rows, columns, bias, blocks=1 + i % 3)
        want, off = product(x, weight, of_one_group(rows))
        if bias is not None:
            want, off = want + bias, off + 2 * ROUNDING * abs(want + bias)
        assert_near(got, (want, off))


@pytest.mark.parametrize("sizes", [HOPPER, pytest.param(AMPERE, marks=pytest.mark.long), TURING])
def test_experts(
    emulated: Callable[..., Emulated], rng: np.random.Generator, sizes: tuple[int, int]
) -> None:
    """A list of tiles: gated, whose panels the next product reads."""
    gemm, hidden, inner = emulated(sizes), 107, 69
    tiles, x = tiles_of(rng, COUNTS, 50), normal(rng, 50, hidden)
    rows, groups = len(tiles.source), len(COUNTS)
    gates, ups = normal(rng, groups, inner, hidden), normal(rng, groups, inner, hidden)
    down = normal(rng, groups, 101, inner)

    panels = gemm.gated(gemm.arrange(x, tiles), pack_gated(gates, ups), rows, inner, tiles, 3)
    filled = tiles.filled
    group_of, got = tiles.group_of[filled], rows_of(panels, rows, tiles)[filled]
    assert_near(got[:, :inner], gated_product(x[tiles.source[filled]], gates, ups, group_of))
    assert not got[:, inner:].any()  # the padding that the next product reads
    assert np.isnan(panels[-1]).all()

    out = gemm.linear(panels, pack(down), rows, 101, tiles=tiles, blocks=5)
    assert_near(out[filled], product(got[:, :inner], down, group_of))


@pytest.mark.parametrize("columns", [1, 31, 33, 65])
def test_gated_of_dense_rows(
    emulated: Callable[..., Emulated], rng: np.random.Generator, columns: int
) -> None:
    gemm, rows, inputs = emulated(), 50, 45
    gates, ups = normal(rng, 1, columns, inputs), normal(rng, 1, columns, inputs)
    x = normal(rng, rows, inputs)
    panels = gemm.gated(gemm.arrange(x, height=24), pack_gated(gates, ups), rows, columns)
    got = rows_of(panels, rows)
    assert_near(got[:, :columns], gated_product(x, gates, ups, of_one_group(rows)))
    assert not got[:, columns:].any()


def test_a_row_has_the_same_bits_in_every_tile(
    emulated: Callable[..., Emulated], rng: np.random.Generator
) -> None:
    """Alone, among others, in tiles of every height, and gathered."""
    x, bias = normal(rng, 53, 107), normal(rng, 132)
    shapes = (132, 107), (40, 107), (40, 107)
    weight, gates, ups = (np.repeat(normal(rng, 1, *s), len(COUNTS), 0) for s in shapes)

    gemm, tiles = emulated(), tiles_of(rng, COUNTS, len(x))

    def both(x: Float32, tiles: Tiles | None = None, height: int = TALLEST) -> Float32:
        rows, panels = len(tiles.source) if tiles else len(x), gemm.arrange(x, tiles, height)
        linear = gemm.linear(panels, pack(weight), rows, 132, bias, tiles)
        gated = gemm.gated(panels, pack_gated(gates, ups), rows, 40, tiles)
        return np.hstack([linear, rows_of(gated, rows, tiles)])

    want, filled = both(x), tiles.filled
    assert np.array_equal(both(x, tiles)[filled], want[tiles.source[filled]])
    row = int(rng.integers(len(x)))
    assert np.array_equal(both(x[row : row + 1])[0], want[row])
    for height in ALL_HEIGHTS:
        assert np.array_equal(both(x, height=height), want)


@pytest.mark.skipif(not HAS_FMA, reason="the CPU has no fused multiply-adds")
@pytest.mark.parametrize(
    ("sizes", "rows", "inputs"),
    [
        (HOPPER, 500, 16), (HOPPER, 19, 107), (TURING, 19, 107),
        pytest.param(AMPERE, 19, 107, marks=pytest.mark.long),
        (HOPPER, 19, 300), (HOPPER, 19, 2048),
    ],
)  # fmt: skip
def test_products_have_the_bits_of_cpu_simd(
    emulated: Callable[..., Emulated],
    rng: np.random.Generator,
    sizes: tuple[int, int],
    rows: int,
    inputs: int,
) -> None:
    """A gated product, and one that reads its result; gates from small to beyond what exp holds."""
    gemm, inner = emulated(sizes), 69
    x, ups = normal(rng, rows, inputs), normal(rng, inner, inputs)
    sizes_of_gates = np.exp(rng.uniform(-4, 6, (inner, 1))) / np.sqrt(inputs)
    gates = (normal(rng, inner, inputs) * sizes_of_gates).astype(np.float32)
    down, bias = normal(rng, 101, inner), normal(rng, 101)
    panels = gemm.gated(gemm.arrange(x), pack_gated(gates[None], ups[None]), rows, inner)
    out = gemm.linear(panels, pack(down[None]), rows, 101, bias)

    w1, w3, w2 = (Tensor.of_array("w", matrix) for matrix in (gates, ups, down))
    want = cpu_simd.linear(x, packing.pack_gated([w1], [w3]), inner)
    assert_same_bits(rows_of(panels, rows)[:, :inner], want)
    assert_same_bits(out, cpu_simd.linear(want, packing.pack([[w2]]), 101, bias))


def test_a_sum_that_is_zero_is_positive(emulated: Callable[..., Emulated]) -> None:
    """Though each chain is -0, because its terms are too small for float32, and so is the bias."""
    k = STEP * GEMM.GROUPS  # a step for each chain
    x, weight = np.full((1, k), -1e-30, np.float32), np.full((1, 1, k), 1e-30, np.float32)
    bias = np.full(1, -0.0, np.float32)
    gemm = emulated()
    got = gemm.linear(gemm.arrange(x), pack(weight), 1, 1, bias)
    assert_same_bits(got, np.zeros((1, 1), np.float32))
