"""The router's choice on the CPU, a host thread for each CUDA thread, against NumPy."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.compiling import INCLUDE, SOURCES

from tests.cuda.test_emulated import COMPILER, has_cpp20

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Choice = tuple[Int32, Float32]
Choose = Callable[[Float32, Float32], Choice]

SPLITS = 16  # sums that the kernel adds up to a logit; kSplits in router.cu
SIZES = [(5, 3), (33, 8)]  # experts, taken
SCALING = 1.5


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Choose]:
    """The kernel `choose` of so many experts, of which so many are taken."""
    folder = tmp_path_factory.mktemp("router")
    if COMPILER is None or not has_cpp20(folder):
        pytest.skip("there is no g++ with C++20 to compile kernels for the CPU with")
    sources = shutil.copytree(INCLUDE, folder / "sources")
    shutil.copytree(Path(__file__).parent / "emulated", sources, dirs_exist_ok=True)

    @cache
    def compiled(experts: int, taken: int) -> Choose:
        program = folder / f"router-{experts}-{taken}"
        constants = {"HIDDEN": 16, "VECTOR": 4, "EXPERTS": experts, "TAKEN": taken}
        subprocess.run(
            [str(COMPILER), "-std=c++20", "-O1", "-pthread", f"-I{sources}", f"-I{SOURCES}",
             *(f"-D{name}={value}" for name, value in constants.items()),
             str(sources / "router.cpp"), "-o", str(program)], check=True,
        )  # fmt: skip
        return lambda logits, bias: chosen(program, taken, logits, bias)

    return compiled


def chosen(program: Path, taken: int, logits: Float32, bias: Float32) -> Choice:
    sums = np.zeros((SPLITS, *logits.shape), np.float32)
    sums[3] = logits
    done = subprocess.run(
        [str(program), str(len(logits)), "1", str(SCALING)],
        input=sums.tobytes() + bias.tobytes(), stdout=subprocess.PIPE, check=True, timeout=100,
    )  # fmt: skip
    ids, weights = np.split(np.frombuffer(done.stdout, np.int32), 2)
    return ids.reshape(-1, taken), weights.view(np.float32).reshape(-1, taken)


def expected(taken: int, logits: Float32, bias: Float32) -> Choice:
    scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    is_nan = np.isnan(scores).any(axis=1, keepdims=True)
    biased = np.where(is_nan, np.float32(0), scores) + bias
    ids = np.argsort(-biased, axis=1, kind="stable")[:, :taken]
    weights = np.take_along_axis(scores, ids, axis=1)
    weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-6)) * SCALING
    return ids.astype(np.int32), np.where(is_nan, np.nan, weights)


@pytest.mark.parametrize("sizes", SIZES)
def test_choice(router: Callable[[int, int], Choose], sizes: tuple[int, int]) -> None:
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
        ids, weights = router(*sizes)(logits, biases)
        want_ids, want_weights = expected(taken, logits, biases)
        assert np.array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want_weights, rtol=2e-6)
        assert np.isnan(weights[[3, 4, 9]]).all()
