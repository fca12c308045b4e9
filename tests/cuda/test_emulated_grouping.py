"""Few tokens are chosen and grouped in one kernel, on the CPU, where CUDA threads take turns.

It leaves the bits of `choose_by_sums`, but no expert to rows of zeros, and the lists of
`group_by_expert`'s twin.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.compiling import definitions
from lfm2kit_cuda.constants import EXPERTS, GROUPING, ROUTER

from tests.cuda.emulating import compiled_program, sources_in
from tests.cuda.test_emulated_experts import POISON, written
from tests.cuda.test_grouping import grouped

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

SIZES = [  # experts, taken
    (33, 8),
    *(pytest.param(sizes, marks=pytest.mark.long) for sizes in ((5, 3), (32, 4), (64, 4))),
]
TILINGS = [(8, 8, False), (4, 1, False), (48, 8, True), (16, 8, True), (3, 1, True)]
MOST = GROUPING.MOST_TOKENS
HIDDEN = 520  # more than is read of a row at once


class Routed(NamedTuple):
    """What `choose_by_sums` leaves, and then what `choose_and_group` does."""

    ids: Ints
    weights: Ints  # bits
    its_ids: Ints
    its_weights: Ints
    source: Ints
    place: Ints
    tiles: Ints
    count: Ints


Route = Callable[[Float32, Float32, Float32, Sequence[int], tuple[int, int, bool]], Routed]


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Route]:
    """Compile the kernels for a number of experts, and of those that a token takes."""
    folder = tmp_path_factory.mktemp("grouping")
    sources = sources_in(folder)

    @cache
    def compiled(experts: int, taken: int) -> Route:
        constants = {"HIDDEN": HIDDEN, "VECTOR": 4, "EXPERTS": experts, "TAKEN": taken}
        defined = [*definitions("blocks/router", constants), *definitions("blocks/grouping", {})]
        program = compiled_program(
            sources, "grouping", defined, folder / f"grouping-{experts}-{taken}"
        )
        return lambda *case: routed(program, taken, *case)

    return compiled


def routed(
    program: Path,
    taken: int,
    x: Float32,
    sums: Float32,
    bias: Float32,
    local: Sequence[int],
    tiling: tuple[int, int, bool],
) -> Routed:
    pairs = sums.shape[1] * taken
    slots = -(-(pairs + (EXPERTS.ALIGNMENT - 1) * len(local)) // EXPERTS.ALIGNMENT)
    slots *= EXPERTS.ALIGNMENT
    most = pairs // tiling[0] + len(local)
    numbers = sums.shape[1], len(local), slots, most, *map(int, tiling), 1, 1.5
    arrays = x, sums, bias, np.array(local, np.int32)
    done = subprocess.run(
        [str(program), *map(str, numbers)], check=True, timeout=100, stdout=subprocess.PIPE,
        input=b"".join(array.tobytes() for array in arrays),
    )  # fmt: skip
    out = np.frombuffer(done.stdout, np.int32)
    return Routed(*written(out, *4 * [pairs], slots, pairs, 4 * most, 1))


def random_sums(rng: np.random.Generator, tokens: int, experts: int) -> Float32:
    """Return sums of logits, of which some rows are all alike, have a NaN, or are saturated."""
    sums = rng.standard_normal((ROUTER.SPLITS, tokens, experts)).astype(np.float32) / 4
    kinds = rng.integers(0, 8, tokens)
    sums[:, kinds == 1] = 0
    sums[:, kinds == 2] = 100
    sums[3, kinds == 3, 0] = -np.nan
    sums[5, kinds == 4, ::2] = -np.inf
    return sums


def random_rows(rng: np.random.Generator, tokens: int) -> Float32:
    """Return rows of which some are zeros, or zeros but for one element."""
    x = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
    kinds = rng.integers(0, 5, tokens)
    x[kinds < 3] = 0
    x[kinds == 0] *= np.float32(-1)
    x[kinds == 1, rng.choice([0, 511, 512, HIDDEN - 1])] = rng.choice([1e-40, np.nan])
    return x


def random_local(rng: np.random.Generator, experts: int) -> Sequence[int]:
    """Return all experts, or any of them in any order."""
    is_all = rng.random() < 0.5
    return range(experts) if is_all else rng.permutation(experts)[: rng.integers(1, experts)]


@pytest.mark.parametrize("sizes", SIZES)
def test_few_tokens_are_chosen_and_grouped_at_once(
    routing: Callable[[int, int], Route],
    rng: np.random.Generator,
    sizes: tuple[int, int],
) -> None:
    experts, taken = sizes
    for i, tokens in enumerate((1, 2, MOST, *rng.integers(3, MOST, 2))):
        sums, local = random_sums(rng, tokens, experts), random_local(rng, experts)
        x = random_rows(rng, tokens)
        bias = rng.standard_normal(experts).astype(np.float32) * np.float32(
            rng.choice([0, 0.05, 3])
        )
        tiling = TILINGS[i % len(TILINGS)]
        got = routing(*sizes)(x, sums, bias, local, tiling)
        is_zero = (x == 0).all(axis=1, keepdims=True)
        ids = np.where(is_zero, np.int32(-1), got.ids.reshape(-1, taken))
        assert np.array_equal(got.its_ids, ids.reshape(-1))
        assert np.array_equal(got.its_weights, got.weights)
        source, place, tiles = grouped(ids, local, *tiling)
        assert np.array_equal(got.source[: len(source)], source)
        assert (got.source[len(source) :] == -1).all()
        assert np.array_equal(got.place, place)
        assert got.count[0] == len(tiles)
        assert np.array_equal(got.tiles[: tiles.size], tiles.reshape(-1))
        assert (got.tiles[tiles.size :] == POISON).all()
