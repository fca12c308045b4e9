"""Ranks on real GPUs: one GPU each, however they see them, and never one GPU for two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from lfm2kit_cuda.requirements import why_unavailable

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec, flags_for, version_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mpi,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

A_WHILE = 280  # seconds: kernels may have to be compiled first
RUN = [sys.executable, "-m", "lfm2kit", "run", "-n", "8", "-v"]


def job(
    *visible: str, arguments: Sequence[str] = ("--backend", "cuda")
) -> subprocess.CompletedProcess[str]:
    """Run a job whose ranks see these devices: each string is a CUDA_VISIBLE_DEVICES."""
    mpiexec = find_mpiexec()
    command = [mpiexec, *flags_for(version_of(mpiexec), 2)]
    for i, devices in enumerate(visible):
        separator = [":"] if i else []
        command += [*separator, "-n", "1", "env", f"CUDA_VISIBLE_DEVICES={devices}"]
        command += [*RUN, *arguments]
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=A_WHILE, env=variables)


def needs_two_devices() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("it takes two GPUs")


def test_two_ranks_that_see_the_same_gpu_are_refused() -> None:
    done = job("0", "0")
    assert done.returncode == 2
    assert "ranks 0, 1 would share the GPU" in done.stderr
    assert "VALID" not in done.stdout


@pytest.mark.parametrize("visible", [("0", "1"), ("0,1", "0,1")])
def test_two_ranks_have_a_gpu_each_however_they_see_them(visible: tuple[str, str]) -> None:
    needs_two_devices()
    done = job(*visible)
    assert done.returncode == 0, done.stderr
    assert "VALID" in done.stdout.splitlines()


def test_two_ranks_that_see_the_same_gpus_in_another_order_are_refused() -> None:
    needs_two_devices()
    assert job("0,1", "1,0").returncode == 2


def test_two_ranks_of_hybrid_have_the_bits_of_one(tmp_path: Path) -> None:
    needs_two_devices()
    outputs = [tmp_path / "one.bin", tmp_path / "two.bin"]
    for file, visible in zip(outputs, [("0",), ("0", "1")], strict=True):
        done = job(*visible, arguments=("--backend", "hybrid", "--outputs", str(file)))
        assert done.returncode == 0, done.stderr
    one, two = (file.read_bytes() for file in outputs)
    assert one == two
