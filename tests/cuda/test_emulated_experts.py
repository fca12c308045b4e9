"""The grouping of pairs by expert, and their weighted sum, on the CPU, against NumPy.

CUDA threads take turns.  Every array that a kernel writes is full of one odd number
before, so that what it should have written and did not is seen, and what it should not have.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cpu_simd.blocks.feed_forward import _combine
from lfm2kit_cuda.compiling import definitions

from tests.cuda.emulating import compiled_program, sources_in
from tests.cuda.test_grouping import grouped

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Run = Callable[..., Ints]

POISON, MARGIN = -77777, 64  # as in emulated/experts.cpp
NOBODY = -1
TILINGS = [(48, 8, True), (16, 16, False)]  # rows, step, by height


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """Compile the kernels for a number of experts that each token takes."""
    folder = tmp_path_factory.mktemp("experts")
    sources = sources_in(folder)

    @cache
    def compiled(taken: int) -> Run:
        defined = definitions("blocks/experts", {"VECTOR": 4, "TAKEN": taken})
        program = compiled_program(sources, "experts", defined, folder / f"experts-{taken}")

        def run(name: str, *numbers: int, arrays: tuple[npt.NDArray[np.generic], ...]) -> Ints:
            done = subprocess.run(
                [str(program), name, *map(str, numbers)], check=True, timeout=100,
                input=b"".join(a.tobytes() for a in arrays), stdout=subprocess.PIPE,
            )  # fmt: skip
            return np.frombuffer(done.stdout, np.int32)

        return run

    return compiled


def written(out: Ints, *sizes: int) -> list[Ints]:
    """Return the arrays of these sizes; behind each nothing may have been written."""
    arrays = []
    for size in sizes:
        array, margin, out = np.split(out, [size, size + MARGIN])
        assert (margin == POISON).all()
        arrays.append(array)
    assert len(out) == 0
    return arrays


def random_ids(rng: np.random.Generator, local: tuple[int, ...], shape: tuple[int, int]) -> Ints:
    """Return local ids, of which every fourth is nobody's, and every fourth any expert's."""
    ids = rng.choice(np.array(local, np.int32), shape)
    ids[rng.random(shape) < 0.25] = NOBODY
    others = rng.random(shape) < 0.25
    ids[others] = rng.integers(0, 8, others.sum())
    return ids


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(
    ("tokens", "local"), [(70, (5, 0, 7)), (1, (2,)), (60, (0, 1, 2)), (300, (3, 6))]
)
def test_pairs_of_nobody_and_of_others_go_nowhere(
    experts: Callable[[int], Run],
    tokens: int,
    local: tuple[int, ...],
    tiling: tuple[int, int, bool],
) -> None:
    """Local experts are any ids in any order; all is as if there were no pairs but theirs."""
    taken, rng = 3, np.random.default_rng(tokens)
    ids = random_ids(rng, local, (tokens, taken))
    if tokens == 60:
        ids[:] = NOBODY
    slots, most = -(-(ids.size + 7 * len(local)) // 8) * 8, ids.size // tiling[0] + len(local)
    numbers = (ids.size, len(local), 8, slots, most, *map(int, tiling))
    out = experts(taken)("group", *numbers, arrays=(ids, np.array(local, np.int32)))
    source, place, tiles, count = written(out, slots, ids.size, 4 * most, 1)
    want_source, want_place, want_tiles = grouped(ids, local, *tiling)
    assert np.array_equal(source[: len(want_source)], want_source)
    assert (source[len(want_source) :] == -1).all()
    assert np.array_equal(place, want_place)
    assert count[0] == len(want_tiles)
    assert np.array_equal(tiles.reshape(-1, 4)[: len(want_tiles)], want_tiles)
    assert (tiles.reshape(-1, 4)[len(want_tiles) :] == POISON).all()


def outputs_places_and_weights() -> tuple[Float32, Ints, Float32]:
    """Return arguments with NaN where nothing may come from: -1, and the row read in its stead."""
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((8, 20)).astype(np.float32)
    outputs[0] = np.nan
    weights = rng.random((6, 3), np.float32)
    place = np.array([[1, 2, 3], [-1, 4, 5], [6, -1, 7], [1, 2, -1], [-1, -1, 3], [-1, -1, -1]])
    place = place.astype(np.int32)
    weights[place < 0] = np.nan
    weights[4, 2] = -0.0
    return outputs, place, weights


def test_a_sum_has_nothing_of_nobody(experts: Callable[[int], Run]) -> None:
    """The sum starts from the first product, even if that is -0."""
    arrays = outputs_places_and_weights()
    want = expected_sums(*arrays)
    out = experts(3)("combine", *want.shape, 8, arrays=arrays)
    delta = written(out, want.size)[0]
    assert np.array_equal(delta, want.reshape(-1).view(np.int32))  # the sign of 0, too


def test_cpu_simd_adds_with_the_same_bits() -> None:
    outputs, place, weights = outputs_places_and_weights()
    delta = np.full((len(place), outputs.shape[1]), np.nan, np.float32)
    _combine(outputs, place.astype(np.int64), weights, delta)
    want = expected_sums(outputs, place, weights)
    assert np.array_equal(delta.view(np.int32), want.view(np.int32))


def expected_sums(outputs: Float32, place: Ints, weights: Float32) -> Float32:
    sums = np.zeros((len(place), outputs.shape[1]), np.float32)
    for row, there in enumerate(place >= 0):
        products = [weights[row, k] * outputs[place[row, k]] for k in np.flatnonzero(there)]
        if products:
            sums[row] = products[0]
        for product in products[1:]:
            sums[row] += product
    return sums
