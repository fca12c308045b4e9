"""Attention between its projections on the CPU, a host thread for each CUDA thread."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.compiling import INCLUDE, SOURCES

from tests.cuda.test_emulated import COMPILER, has_cpp20

Float32 = npt.NDArray[np.float32]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
GROUP, KEYS = HEADS // KV_HEADS, KV_HEADS * HEAD_DIM


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    if COMPILER is None or not has_cpp20(folder):
        pytest.skip("there is no g++ with C++20 to compile kernels for the CPU with")
    sources = shutil.copytree(INCLUDE, folder / "sources")
    shutil.copytree(Path(__file__).parent / "emulated", sources, dirs_exist_ok=True)
    sizes = {"HEADS": HEADS, "KV_HEADS": KV_HEADS, "HEAD_DIM": HEAD_DIM, "INNER": "F32"}
    subprocess.run(
        [str(COMPILER), "-std=c++20", "-O1", "-pthread", f"-I{sources}", f"-I{SOURCES}",
         *(f"-D{name}={value}" for name, value in sizes.items()),
         str(sources / "attention.cpp"), "-o", str(folder / "attention")], check=True,
    )  # fmt: skip
    return folder / "attention"


def attended(program: Path, qkv: Float32, lengths: list[int]) -> Float32:
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    done = subprocess.run(
        [str(program), str(len(qkv)), str(len(lengths)), str(max(lengths)), str(HEAD_DIM**-0.5)],
        input=qkv.tobytes() + positions.tobytes() + ends.tobytes(),
        stdout=subprocess.PIPE, check=True, timeout=100,
    )  # fmt: skip
    return np.frombuffer(done.stdout, np.float32).reshape(len(qkv), -1)


def expected(qkv: Float32, lengths: list[int]) -> Float32:
    """Row by row, each of the keys and values up to itself alone."""
    q, k, v = np.split(qkv.astype(np.float64), [HEADS * HEAD_DIM, HEADS * HEAD_DIM + KEYS], axis=1)
    heads = np.empty_like(q)
    for first, end in pairwise(np.cumsum([0, *lengths])):
        for row in range(first, end):
            for head in range(HEADS):
                of_query = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                of_key = slice(head // GROUP * HEAD_DIM, (head // GROUP + 1) * HEAD_DIM)
                scores = k[first : row + 1, of_key] @ q[row, of_query] * HEAD_DIM**-0.5
                weights = np.exp(scores - scores.max())
                heads[row, of_query] = weights / weights.sum() @ v[first : row + 1, of_key]
    return heads.astype(np.float32)


def test_rows_see_what_is_before_them_and_nothing_else(program: Path) -> None:
    """Values that are not finite, at several places of tiles of 32 keys, spoil no row before."""
    lengths, rng = [37, 1, 40], np.random.default_rng(0)
    qkv = rng.standard_normal((sum(lengths), HEADS * HEAD_DIM + 2 * KEYS)).astype(np.float32)
    np.testing.assert_allclose(attended(program, qkv, lengths), expected(qkv, lengths), rtol=1e-4,
                               atol=1e-6)  # fmt: skip
    clean = attended(program, qkv, lengths)
    for row, value in ((35, np.nan), (38 + 31, np.inf), (38 + 36, np.nan)):
        spoilt = qkv.copy()
        spoilt[row] = value
        got = attended(program, spoilt, lengths)
        sequence = np.repeat(np.arange(3), lengths)
        is_after = (np.arange(len(qkv)) >= row) & (sequence == sequence[row])
        assert not np.isfinite(got[is_after]).any()
        assert np.array_equal(got[~is_after], clean[~is_after])
