"""How many threads compute, and that none of them is busy when nothing is to be done."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from lfm2kit_cpu_simd import threads
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_cpu_simd.crew import CREW, CROWDED, PATIENCE, WINDOW, Crew
from lfm2kit_cpu_simd.threads import CORES, threading_notes

from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.building.loading import load_model
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.timing import waits

BATCH = Batch.of_sequences([range(i, i + 16) for i in range(20)])
SPINNING = """
import time
from lfm2kit.building.loading import load_model
from lfm2kit.batch import Batch
model = load_model("tiny", "cpu_simd")
model.logits(Batch.of_sequences([range(16)] * 20))
time.sleep(0.2)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""

RESTING = """
import os
import numpy as np
from lfm2kit_cpu_simd import threads
from lfm2kit_cpu_simd.blocks.feed_forward import _copy_rows
from lfm2kit_cpu_simd.crew import CREW
def compute():
    CREW.hire(2)
    x = np.zeros((100, 8), np.float32)
    _copy_rows(x, np.arange(100), x.copy())
for work in (int, compute, CREW.rest, compute):
    work()
    print(len(os.listdir("/proc/self/task")))
"""


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before, asked = numba.get_num_threads(), Crew.asked
    yield
    Crew.asked = asked
    CREW.hire(before)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell the crew that nobody wants the cores."""
    monkeypatch.setattr(CREW, "_waits", dict)


def test_one_thread_and_two_give_the_same_bits(alone: None) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    one = load_model("tiny", "cpu_simd", threads=1).logits(BATCH).copy()
    assert numba.get_num_threads() == 1
    two = load_model("tiny", "cpu_simd", threads=2).logits(BATCH)
    assert numba.get_num_threads() == 2
    np.testing.assert_array_equal(one, two)


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(Lfm2kitError, match="threads=5000"):
        CpuSimdBackend(Context(threads=5000))


def test_a_quota_of_processor_time_limits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2kit.process.machine.cores", lambda: 17)
    fresh = runpy.run_path(threads.__file__)
    assert fresh["CORES"] == 17


def test_ranks_on_one_machine_share_its_cores() -> None:
    CpuSimdBackend(Context(local_ranks=CORES))
    assert numba.get_num_threads() == 1


def test_blocks_called_by_other_threads_keep_to_what_was_asked_for() -> None:
    """As those of a crossing are, and those of a user's own threads."""
    CpuSimdBackend(Context(threads=1))
    with ThreadPoolExecutor(1) as other:
        assert other.submit(CREW.size).result() == 1


BOUND = """
from lfm2kit.building.loading import load_model
from lfm2kit_cpu_simd.crew import CREW
from tests.cpu_simd.test_threads import BATCH
import numba
CREW._waits = dict  # other processes do not count here
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


class Machine:
    """A clock, and how long each thread has waited for a core."""

    def __init__(self) -> None:
        self.now, self.preempted, self.waited, self.reads = 0.0, 0, {"1": 0.0, "2": 0.0}, 0

    def crew(self, most: int) -> Crew:
        crew = Crew(lambda: self.now, lambda: self.preempted, self.waits)
        crew.hire(most)
        return crew

    def waits(self) -> dict[str, float]:
        self.reads += 1
        return dict(self.waited)

    def passes(self, windows: int, waiting: float = 0.0) -> None:
        """Let some time pass, of which a thread waits a share."""
        seconds = 1.001 * windows * WINDOW  # sums of windows round to less than their number
        self.now += seconds
        self.waited["2"] += seconds * waiting
        self.preempted += waiting > 0


def sizes(machine: Machine, crew: Crew, windows: int, waiting: float) -> list[int]:
    found = []
    for _ in range(windows):
        machine.passes(1, waiting)
        found.append(crew.size())
    return found


def test_a_crew_gives_up_a_thread_for_each_window_in_which_one_waits_for_a_core() -> None:
    machine = Machine()
    crew = machine.crew(2)
    assert sizes(machine, crew, 4, CROWDED) == [2, 1, 1, 1]  # and keeps the last one
    assert numba.get_num_threads() == 1


def test_a_crew_keeps_its_threads_through_short_waits() -> None:
    machine = Machine()
    assert sizes(machine, machine.crew(2), 100, 0.9 * CROWDED / 2) == [2] * 100


def test_a_larger_crew_gives_up_one_of_many_threads_for_a_shorter_wait() -> None:
    machine = Machine()
    most = numba.config.NUMBA_NUM_THREADS
    if most < 2:
        pytest.skip("one core")
    assert sizes(machine, machine.crew(most), 2, 1.1 * CROWDED / most)[-1] == most - 1


def test_a_crew_reads_no_accounts_while_no_core_is_taken_away() -> None:
    machine = Machine()
    assert sizes(machine, machine.crew(2), 100, 0.0) == [2] * 100
    assert machine.reads == 0


def test_a_crew_tries_again_ever_later_while_it_fails_and_soon_once_it_works() -> None:
    machine = Machine()
    crew = machine.crew(2)
    sizes(machine, crew, 2, CROWDED)
    tries = []
    for _ in range(8):
        start = machine.now
        while crew.size() == 1:
            machine.passes(1)
        tries.append(round(machine.now - start, 3))
        sizes(machine, crew, 2, CROWDED)
        assert crew.size() == 1
    assert tries == sorted(tries)
    assert 2 * PATIENCE[0] - WINDOW <= tries[0] <= 2 * PATIENCE[0] + WINDOW
    assert PATIENCE[1] - WINDOW <= tries[-1] <= PATIENCE[1] + WINDOW
    sizes(machine, crew, 2 * int(PATIENCE[1] / WINDOW) + 2, 0.0)
    assert crew.size() == 2
    assert sizes(machine, crew, 2, CROWDED) == [2, 1]
    assert 1 in sizes(machine, crew, int(PATIENCE[0] / WINDOW), 0.0)
    assert sizes(machine, crew, int(PATIENCE[0] / WINDOW) + 2, 0.0)[-1] == 2


def test_a_crew_never_takes_more_than_it_was_given() -> None:
    machine = Machine()
    crew = machine.crew(1)
    machine.passes(1000)
    assert crew.size() == 1


CROWDED_CORE = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from lfm2kit.building.loading import load_model
from lfm2kit_cpu_simd.crew import CREW
from tests.cpu_simd.test_threads import BATCH
model = load_model("tiny", "cpu_simd", threads=2)
end = time.monotonic() + 60
while CREW.size() > 1 and time.monotonic() < end:
    model.logits(BATCH)
print(CREW.size())
"""


@pytest.mark.skipif(not waits(), reason="this system has no account of waiting threads")
def test_two_threads_on_one_core_become_one() -> None:
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", CROWDED_CORE], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1"], done.stderr


@pytest.mark.parametrize(("there", "told"), [({"omppool"}, 0), ({"tbbpool"}, 0), (set(), 1)])
def test_a_machine_without_openmp_and_tbb_is_told(
    monkeypatch: pytest.MonkeyPatch, there: set[str], told: int
) -> None:
    def imported(name: str) -> None:
        if name.rpartition(".")[2] not in there:
            raise ImportError(name)

    monkeypatch.setattr("lfm2kit_cpu_simd.threads.import_module", imported)
    assert len(threading_notes()) == told
    assert all("libgomp" in note for note in threading_notes())


def test_a_thread_that_leaves_kernels_to_others_ends_its_own_threads() -> None:
    """Asked of a new process: other tests leave threads."""
    done = subprocess.run(
        [sys.executable, "-c", RESTING], capture_output=True, text=True, check=True
    )
    alone, computing, resting, again = map(int, done.stdout.split())
    assert alone == resting < computing == again
