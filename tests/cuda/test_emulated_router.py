"""The router behind its product on the CPU, where CUDA threads take turns, against NumPy."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.compiling import definitions
from lfm2kit_cuda.constants import ROUTER

from tests.cuda.emulating import compiled_program, sources_in

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Choice = tuple[Int32, Float32]
Routed = tuple[Choice, Float32, Choice]  # together, the scores, the choice from these
Route = Callable[[Float32, Float32], Routed]

SIZES = [(5, 3), (33, 8)]  # experts, taken
SCALING = 1.5


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Route]:
    """Compile the kernels for a number of experts, and of those that a token takes."""
    folder = tmp_path_factory.mktemp("router")
    sources = sources_in(folder)

    @cache
    def compiled(experts: int, taken: int) -> Route:
        constants = {"HIDDEN": 16, "VECTOR": 4, "EXPERTS": experts, "TAKEN": taken}
        defined = definitions("blocks/router", constants)
        program = compiled_program(sources, "router", defined, folder / f"router-{experts}-{taken}")
        return lambda logits, bias: routed(program, taken, logits, bias)

    return compiled


def routed(program: Path, taken: int, logits: Float32, bias: Float32) -> Routed:
    sums = np.zeros((ROUTER.SPLITS, *logits.shape), np.float32)
    sums[3] = logits
    done = subprocess.run(
        [str(program), str(len(logits)), "1", str(SCALING)],
        input=sums.tobytes() + bias.tobytes(), stdout=subprocess.PIPE, check=True, timeout=100,
    )  # fmt: skip
    pairs = len(logits) * taken
    ends = np.cumsum([pairs, pairs, logits.size, pairs])
    arrays = np.split(np.frombuffer(done.stdout, np.int32), ends)
    ids, weights = (array.reshape(-1, taken) for array in arrays[:2])
    ids_apart, weights_apart = (array.reshape(-1, taken) for array in arrays[3:])
    scores = arrays[2].view(np.float32).reshape(logits.shape)
    return (
        (ids, weights.view(np.float32)), scores, (ids_apart, weights_apart.view(np.float32)),
    )  # fmt: skip


def expected(taken: int, logits: Float32, bias: Float32) -> Choice:
    scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    is_nan = np.isnan(scores).any(axis=1, keepdims=True)
    biased = np.where(is_nan, np.float32(0), scores) + bias
    ids = np.argsort(-biased, axis=1, kind="stable")[:, :taken]
    weights = np.take_along_axis(scores, ids, axis=1)
    weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-6)) * SCALING
    return ids.astype(np.int32), np.where(is_nan, np.nan, weights)


@pytest.mark.parametrize("sizes", SIZES)
def test_choice(router: Callable[[int, int], Route], sizes: tuple[int, int]) -> None:
    """Random rows, ties, saturated and NaN scores, with and without masked experts."""
    experts, taken = sizes
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((19, experts)).astype(np.float32)
    logits[1] = 0
    logits[2] = 120
    logits[3] = np.nan
    logits[4, -1] = np.nan
    logits[9, 0] = -np.nan
    logits[5, ::2] = -np.inf
    bias = 0.3 * rng.standard_normal(experts).astype(np.float32)
    masked = bias.copy()
    masked[rng.permutation(experts)[: experts - taken]] = -np.inf
    for biases in (np.zeros_like(bias), bias, masked):
        (ids, weights), scores, apart = router(*sizes)(logits, biases)
        want_ids, want_weights = expected(taken, logits, biases)
        assert np.array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want_weights, rtol=2e-6)
        assert np.isnan(weights[[3, 4, 9]]).all()
        want_scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        np.testing.assert_array_equal(scores, want_scores.astype(np.float32))
        assert np.array_equal(apart[0], ids)
        assert np.array_equal(apart[1].view(np.int32), weights.view(np.int32))
