"""Ranks that exchange tokens through GPUs' memory: the bits of one process, and how they fail.

    python -m pytest -m gpu tests/cuda/test_exchange_on_gpu.py

Two ranks share one GPU, which `LFM2KIT_CUDA_SHARED` allows.  Where there are several, as many ranks
as these have one each.
On a shared GPU the ranks' kernels take turns, so an exchange takes milliseconds there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lfm2kit_cuda.requirements import why_unavailable

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec, flags_for, version_of

from tests.cuda.alone import ALONE
from tests.random_model import CONFIG, write_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mpi,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

A_WHILE = 280  # seconds: kernels may have to be compiled first
SHARED = {"CUDA_VISIBLE_DEVICES": "0", "LFM2KIT_CUDA_SHARED": "1"}
RUN = [sys.executable, "-m", "lfm2kit", "run", "--backend", "cuda"]
PRECISIONS = ["fp32", "bf16", "fp16"]


def devices() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


@pytest.fixture(params=["one GPU for two", "a GPU each", "each sees its own GPU alone"])
def visible(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """Return what ranks see, as variables of each."""
    if request.param == "one GPU for two":
        return [SHARED] * 2
    if devices() < 2:
        pytest.skip("it takes two GPUs")
    numbers = list(map(str, range(devices())))
    if request.param == "a GPU each":
        return [{"CUDA_VISIBLE_DEVICES": ",".join(numbers)}] * len(numbers)
    return [{"CUDA_VISIBLE_DEVICES": number} for number in numbers]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("random") / "model")


def on_ranks(visible: list[dict[str, str]], command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command on a rank for each of `visible`, or alone for one."""
    mpiexec = find_mpiexec()
    line = [mpiexec, *flags_for(version_of(mpiexec), len(visible))] if len(visible) > 1 else []
    for i, variables in enumerate(visible):
        settings = ["env", *(f"{name}={value}" for name, value in variables.items())]
        line += [*([":"] if i else []), *(["-n", "1"] if len(visible) > 1 else [])]
        line += [*settings, *command]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(line, capture_output=True, text=True, timeout=A_WHILE, env=environment)


class Runs:
    """Runs of the random model, those of one GPU alone kept."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._alone: dict[tuple[str, ...], bytes] = {}

    def outputs_of(
        self, visible: list[dict[str, str]], *arguments: str
    ) -> tuple[bytes, dict[str, Any]]:
        """Return the logits of a run, and its record."""
        outputs, record = self._folder / "out.bin", self._folder / "record.json"
        what = ["--model", str(self._model), "--random-inputs", "16", *arguments]
        done = on_ranks(visible, [*RUN, *what, "--outputs", str(outputs), "--json", str(record)])
        assert done.returncode == 0, done.stderr
        return outputs.read_bytes(), json.loads(record.read_text())

    def alone(self, *arguments: str) -> bytes:
        """Return the logits of a run on one GPU."""
        if arguments not in self._alone:
            self._alone[arguments], _ = self.outputs_of([{"CUDA_VISIBLE_DEVICES": "0"}], *arguments)
        return self._alone[arguments]


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(model, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "arguments",
    [("-n", "21", "--batch-size", "3"), ("-n", "1"), ("-n", "7", "--trim"),
     ("-n", "13", "--random-inputs", "31", "--batch-size", "4")],
    ids=["captured", "a rank without tokens", "trimmed", "odd lengths"],
)  # fmt: skip
def test_ranks_have_the_bits_of_one(
    visible: list[dict[str, str]], precision: str, arguments: tuple[str, ...], runs: Runs
) -> None:
    words = ("--precision", precision, *arguments)
    one = runs.alone(*words)
    several, record = runs.outputs_of(visible, *words, "--exchange", "device")
    assert one == several
    assert record["exchange"]["memory"].startswith("lfm2kit_cuda:")
    assert not [note for note in record["notes"] if "captured" in note]
    assert_rows_have_the_bytes_of(precision, record)


def assert_rows_have_the_bytes_of(precision: str, record: dict[str, Any]) -> None:
    """Check that rows travel in 16 bits where products read them, and products in float32."""
    element, hidden_size = 4 if precision == "fp32" else 2, CONFIG["hidden_size"]
    for layer in record["exchanged"]["layers"]:
        for name, size in (("dispatch", element), ("combine", 4)):
            of_ranks = (layer[name][of] for of in ("bytes", "header_bytes", "rows"))
            for nbytes, header_bytes, rows in zip(*of_ranks, strict=True):
                assert nbytes - header_bytes == size * hidden_size * rows


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rows_of_16_bits_through_the_host_have_the_bits_of_one(precision: str, runs: Runs) -> None:
    words = ("--precision", precision, "-n", "21", "--batch-size", "3")
    one = runs.alone(*words)
    two, record = runs.outputs_of([SHARED] * 2, *words, "--exchange", "host")
    assert one == two
    assert record["exchange"]["memory"] == "host"
    assert_rows_have_the_bytes_of(precision, record)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("captured", ["0", "1"])
def test_two_ranks_over_nccl_have_the_bits_of_one(
    captured: str, precision: str, runs: Runs
) -> None:
    pytest.importorskip("lfm2kit_nccl", reason="the exchange over NCCL is a plugin")
    if devices() < 2:
        pytest.skip("it takes two GPUs: NCCL refuses two ranks on one")
    words = ("--precision", precision, "-n", "24", "--batch-size", "4")
    one = runs.alone(*words)
    variables = {"CUDA_VISIBLE_DEVICES": "0,1", "LFM2KIT_NCCL_CAPTURED": captured}
    nccl = ("--transport", "nccl", "--exchange", "device")
    two, record = runs.outputs_of([variables] * 2, *words, *nccl)
    assert one == two
    assert record["exchange"]["memory"].startswith("lfm2kit_cuda:")


def test_the_exchange_keeps_the_contract(visible: list[dict[str, str]]) -> None:
    if visible[0] != visible[1]:
        pytest.skip("the check gives all ranks the same variables")
    check = ["transports", "check", "mpi", "--ranks", str(len(visible)), "--backend", "cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "lfm2kit", *check],
        capture_output=True, text=True, timeout=A_WHILE, env={**os.environ, **visible[0]},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


JOINED = """
import os, signal, sys, time
import numpy as np
from lfm2kit import Batch, joined_job, load_model, progress
from lfm2kit.errors import Lfm2kitError
with joined_job() as job:
    rank, size = job.world.rank, job.world.size
    model = load_model("MODEL", "cuda", job=job, exchange="device", precision="PRECISION")
"""

# Each rank has forwards of other forms, and comes to each several times: by itself, captured,
# replayed, and again after mailboxes have grown.
MANY_FORMS = """
    alone = load_model("MODEL", "cuda", independent=True, precision="PRECISION")
    assert model.placed.is_capturable and not model.placed.copies()
    rng = np.random.default_rng(rank)
    sizes = [(5, 1), (0, 3), (16, 16), (1, 0), (5, 1), (40, 100), (5, 1), (16, 16)]
    for turn in range(4):
        for of_ranks in sizes:
            lengths = [1 + int(n) for n in rng.integers(0, 6, of_ranks[rank % 2])]
            if turn % 2:
                lengths = [4] * of_ranks[rank % 2]
            batch = Batch.of_sequences([rng.integers(0, 1000, n).tolist() for n in lengths])
            for _ in range(3):
                assert model.logits(batch).tobytes() == alone.logits(batch).tobytes()
    print("all have the same bits", flush=True)
"""


def program(
    visible: list[dict[str, str]], model: Path, rest: str, precision: str = "fp32"
) -> subprocess.CompletedProcess[str]:
    path = model.parent / "program.py"
    path.write_text((JOINED + rest).replace("MODEL", str(model)).replace("PRECISION", precision))
    return on_ranks(visible, [sys.executable, str(path)])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_forwards_of_any_forms_have_the_bits_of_a_model_alone(
    visible: list[dict[str, str]], precision: str, model: Path
) -> None:
    done = program(visible, model, MANY_FORMS, precision)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all have the same bits") == len(visible)


def assert_a_new_job_runs(visible: list[dict[str, str]]) -> None:
    done = on_ranks(visible, [*RUN, "-v", "-n", "8", "--exchange", "device"])
    assert done.returncode == 0, done.stderr
    assert "VALID" in done.stdout.splitlines()


WARM = """
    batch = Batch.of_sequences([[1, 2, 3]] * 4)
    for _ in range(3):
        model.logits(batch)
    job.barrier()
"""

NEVER_COMES = (
    WARM
    + """
    progress.set_deadline(5.0)
    if rank == 1:
        with model.running(batch.tokens):
            time.sleep(30)  # has agreed on the forward, and does not begin it
    start = time.perf_counter()
    try:
        model.logits(batch)
    except Lfm2kitError as error:
        print(f"after {time.perf_counter() - start:.1f} s: {error}", flush=True)
        os._exit(2)
"""
)


def test_a_rank_that_never_comes_is_named_with_the_layer(
    visible: list[dict[str, str]], model: Path
) -> None:
    start = time.monotonic()
    done = program(visible, model, NEVER_COMES)
    said = re.search(r"after ([\d.]+) s: (.*)", done.stdout)
    assert said is not None, done.stdout + done.stderr
    who = f"layers.2.feed_forward: rank 1 of the {len(visible)} that share experts"
    assert said[2].startswith(f"{who} has sent")
    assert 3 < float(said[1]) < 20
    assert time.monotonic() - start < 120
    assert_a_new_job_runs(visible)


GOES = (
    WARM
    + """
    progress.set_deadline(5.0)
    if rank == 1:
        with model.running(batch.tokens):
            os.kill(os.getpid(), signal.SIGNAL)
    model.logits(batch)
"""
)


@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_gone_ends_the_job_and_a_new_one_runs(
    visible: list[dict[str, str]], end: str, model: Path
) -> None:
    rest = GOES.replace("SIGNAL", end)
    start = time.monotonic()
    done = program(visible, model, rest)
    assert done.returncode != 0
    assert time.monotonic() - start < 150
    assert "rank 1" in done.stderr
    assert_a_new_job_runs(visible)


def free_memory() -> list[int]:
    """Return the free bytes of each GPU."""
    of_each = "[cupy.cuda.Device(i).mem_info[0] for i in range(cupy.cuda.runtime.getDeviceCount())]"
    told = subprocess.run(
        [sys.executable, "-c", f"import cupy; print({of_each})"],
        capture_output=True, text=True, timeout=A_WHILE, check=True,
    )  # fmt: skip
    return [int(number) for number in json.loads(told.stdout)]


@ALONE
@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_after_a_fault_every_gpu_has_its_memory_back(
    visible: list[dict[str, str]], end: str, model: Path
) -> None:
    before = free_memory()
    assert program(visible, model, GOES.replace("SIGNAL", end)).returncode != 0
    assert free_memory() == pytest.approx(before, abs=64 << 20)


OUT_OF_MEMORY = """
    import cupy
    batch = Batch.of_sequences([[1, 2, 3]] * 4)
    model.logits(batch)
    job.barrier()
    if rank == 1:
        free, _ = cupy.cuda.runtime.memGetInfo()
        taken = cupy.cuda.runtime.malloc(free - (64 << 20))
    job.barrier()
    model.logits(Batch.of_sequences([[1] * 500] * 400))
"""


@ALONE
def test_a_gpu_without_memory_for_the_exchange_ends_the_job_in_one_line(
    visible: list[dict[str, str]], model: Path
) -> None:
    done = program(visible, model, OUT_OF_MEMORY)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("lfm2kit: error: ")]
    assert len(errors) == 1, done.stderr
    assert "cudaErrorMemoryAllocation" in errors[0]
    assert "tokens of each rank; try fewer tokens at once, or exchange='host'" in errors[0]
    assert_a_new_job_runs(visible)


def test_ranks_that_share_a_gpu_without_being_asked_to_are_refused() -> None:
    done = on_ranks([{"CUDA_VISIBLE_DEVICES": "0"}] * 2, [*RUN, "-n", "4"])
    assert done.returncode == 2
    assert "ranks 0, 1 would share the GPU" in done.stderr
