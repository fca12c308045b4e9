"""How many threads compute, and that none of them is busy when nothing is to be done."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_cpu_simd.threads import CORES, threading_notes

from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.errors import Lfm2kitError
from lfm2kit.loading import load_model

BATCH = Batch.of_sequences([range(i, i + 16) for i in range(20)])
SPINNING = """
import time
from lfm2kit.loading import load_model
from lfm2kit.batch import Batch
model = load_model("tiny", "cpu_simd")
model.logits(Batch.of_sequences([range(16)] * 20))
time.sleep(0.2)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def test_one_thread_and_two_give_the_same_bits() -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    one = load_model("tiny", "cpu_simd", threads=1).logits(BATCH).copy()
    assert numba.get_num_threads() == 1
    two = load_model("tiny", "cpu_simd", threads=2).logits(BATCH)
    assert numba.get_num_threads() == 2
    np.testing.assert_array_equal(one, two)


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(Lfm2kitError, match="--threads 5000"):
        CpuSimdBackend(Context(threads=5000))


def test_ranks_on_one_machine_share_its_cores() -> None:
    CpuSimdBackend(Context(local_ranks=CORES))
    assert numba.get_num_threads() == 1


BOUND = """
from lfm2kit.loading import load_model
from tests.cpu_simd.test_threads import BATCH
import numba
for _ in range(2):
    load_model("tiny", "cpu_simd").logits(BATCH)
    print(numba.get_num_threads())
"""


def test_threads_that_openmp_binds_stay_as_many() -> None:
    environment = {**os.environ, "OMP_PROC_BIND": "true"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second == str(numba.config.NUMBA_NUM_THREADS)


def test_idle_threads_do_not_spin_after_a_forward() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", SPINNING], env=environment, capture_output=True, text=True
    )
    assert float(done.stdout) < 0.2, done.stderr


def test_a_machine_without_openmp_and_tbb_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading_notes() == []

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("lfm2kit_cpu_simd.threads.import_module", missing)
    assert "libgomp" in threading_notes()[0]
