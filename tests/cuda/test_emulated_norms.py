"""The norms of rows and of heads on the CPU, where CUDA threads take turns, against NumPy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from lfm2kit_cuda.compiling import definitions

from tests.cuda.emulating import compiled_program, sources_in

SIZES = {"rows": 20, "heads": 6}
EPS = 1e-5


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms")
    sources = sources_in(folder)
    constants = {
        "HIDDEN": SIZES["rows"], "VECTOR": 4, "OUT": "F32",
        "HEADS": 2, "KV_HEADS": 1, "HEAD_DIM": SIZES["heads"], "INNER": "F32",
    }  # fmt: skip
    defined = [*definitions("blocks/rows", constants), *definitions("blocks/rotation", constants)]
    return compiled_program(sources, "norms", defined)


@pytest.mark.parametrize("what", SIZES)
def test_a_sum_of_squares_that_overflows_gives_nan(program: Path, what: str) -> None:
    """1 / inf would turn the row into zeros.  Rows before and after keep their values."""
    x = np.random.default_rng(0).standard_normal((5, SIZES[what])).astype(np.float32)
    x[1] *= np.float32(1e18)  # squares that just do not overflow
    x[2] *= np.float32(1e22)
    x[3, 4] = np.nan
    done = subprocess.run(
        [str(program), what, str(len(x)), str(EPS)], input=x.tobytes(),
        stdout=subprocess.PIPE, check=True, timeout=100,
    )  # fmt: skip
    got = np.frombuffer(done.stdout, np.float32).reshape(x.shape)
    assert np.isnan(got[[2, 3]]).all()
    kept = x[[0, 1, 4]].astype(np.float64)
    want = kept / np.sqrt((kept**2).mean(axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(got[[0, 1, 4]], want, rtol=1e-5)
