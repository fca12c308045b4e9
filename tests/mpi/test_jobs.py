"""Real MPI jobs: bits of one process, failures that end all ranks, interrupts without orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import samples

pytestmark = pytest.mark.mpi
LFM2KIT = [sys.executable, "-m", "lfm2kit"]
A_WHILE = 120  # seconds: a job that has not ended by then hangs


def lfm2kit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # One thread a rank: tests share two cores.
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run(
        [*LFM2KIT, *arguments], capture_output=True, text=True, timeout=A_WHILE, env=variables
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("alone") / "outputs.bin"
    assert (
        lfm2kit("run", "-n", "21", "--backend", "cpu_simd", "--outputs", str(path)).returncode == 0
    )
    return samples.read_answers(path)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_t18_the_logits_of_several_ranks_have_the_bits_of_one(
    ranks: int, alone: Any, tmp_path: Path
) -> None:
    path = tmp_path / "outputs.bin"
    done = lfm2kit(
        "run", "-v", "-n", "21", "--ranks", str(ranks), "--backend", "cpu_simd",
        "--batch-size", "4", "--threads", "1", "--outputs", str(path), "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == ranks
    assert "VALID" in done.stderr.splitlines()
    np.testing.assert_array_equal(samples.read_answers(path), alone)


@pytest.mark.parametrize("trim", [[], ["--trim"]])
def test_more_ranks_than_samples_leave_some_without_any(
    trim: list[str], alone: Any, tmp_path: Path
) -> None:
    path = tmp_path / "outputs.bin"
    done = lfm2kit(
        "run", "-n", "1", "--ranks", "4", "--backend", "cpu_simd", "--outputs", str(path), *trim
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(samples.read_answers(path), alone[:1])


def test_trimmed_layers_have_the_same_bits_on_several_ranks(alone: Any, tmp_path: Path) -> None:
    path = tmp_path / "outputs.bin"
    done = lfm2kit(
        "run", "-n", "21", "--ranks", "2", "--backend", "cpu_simd", "--batch-size", "4", "--trim",
        "--outputs", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(samples.read_answers(path), alone)


def test_a_plan_with_several_backends_works_across_ranks() -> None:
    done = lfm2kit(
        "run", "-v", "-n", "8", "--ranks", "2", "--backend", "reference,2-4.moe=cpu_simd"
    )
    assert done.returncode == 0, done.stderr
    assert "VALID" in done.stdout.splitlines()


FAILING = """
import lfm2kit
from lfm2kit.backend import HOST
from lfm2kit.reference.backend import ReferenceBackend

class Failing(ReferenceBackend):
    def __init__(self, context):
        self.rank = context.local_rank
    def build(self, spec, weights):
        block = super().build(spec, weights)
        def failing(*inputs):
            if self.rank == 1:
                raise RuntimeError("the second rank fails")
            return block(*inputs)
        return failing

@lfm2kit.hookimpl
def lfm2kit_backends():
    yield lfm2kit.BackendPlugin("failing", "fails on rank 1", Failing, api_version=1)
"""


@pytest.fixture
def failing_plugin(tmp_path: Path) -> str:
    """A real distribution on PYTHONPATH, found by its entry point."""
    (tmp_path / "failing_plugin.py").write_text(FAILING)
    info = tmp_path / "failing_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lfm2kit]\nfailing = failing_plugin\n")
    return str(tmp_path)


def test_a_rank_that_fails_ends_the_job(failing_plugin: str) -> None:
    done = lfm2kit(
        "run", "-n", "8", "--ranks", "3", "--backend", "reference,mlp=failing",
        PYTHONPATH=failing_plugin,
    )  # fmt: skip
    assert done.returncode not in (0, 1, 2)
    assert "the second rank fails" in done.stderr


def test_ranks_that_would_swamp_the_machine_are_refused_but_in_an_allocation() -> None:
    cores = os.cpu_count() or 1
    done = lfm2kit("run", "-n", "1", "--ranks", str(8 * cores + 1))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"this machine has {cores} cores" in done.stderr
    wrong = lfm2kit("run", "-n", "10000", "--ranks", str(8 * cores + 1), SLURM_JOB_ID="1")
    assert "cores" not in wrong.stderr


def test_what_is_wrong_is_said_once_before_any_rank_starts() -> None:
    done = lfm2kit("run", "--ranks", "3", "-n", "100000")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_file(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "outputs.bin"
    arguments = ["run", "--ranks", "2", "--backend", "reference", "--batch-size", "1"]
    job = subprocess.Popen(
        [*LFM2KIT, *arguments, "--outputs", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert job.stdout is not None
    job.stdout.readline()  # rank 0 has introduced the run: all ranks are up
    children = descendants(job.pid)
    assert len(children) >= 3  # mpiexec and two ranks
    job.send_signal(number)
    assert job.wait(A_WHILE) == 128 + number
    deadline = time.monotonic() + A_WHILE
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if is_running(pid)]
    assert list(tmp_path.iterdir()) == []


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path("/proc", str(pid), "task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
