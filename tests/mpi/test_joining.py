"""Programs of users, and `lfm2kit warmup`, on the ranks of a real job."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.test_faults import A_WHILE, LETS_ANYONE_RUN, LFM2KIT

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec

pytestmark = pytest.mark.mpi
README = Path(__file__).parents[2] / "backends" / "mpi" / "README.md"


def python(ranks: int, program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program on ranks, or alone for a single one."""
    path = folder / "program.py"
    path.write_text(program)
    launcher = [find_mpiexec(), "-n", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [*launcher, sys.executable, str(path)],
        capture_output=True, text=True, timeout=A_WHILE, env=os.environ | LETS_ANYONE_RUN,
    )  # fmt: skip


@pytest.mark.long
def test_the_example_prints_the_same_alone_and_on_ranks(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    program = program.replace("logits[:, :2]", "logits.tobytes().hex()")
    alone, done = (python(ranks, program, tmp_path) for ranks in (1, 4))  # one has no samples
    (shape,) = re.findall(r"# (\(3, \d+\)), ", program)  # what the page says that it prints
    assert alone.stdout.startswith(f"{shape} "), alone.stderr
    assert (done.returncode, done.stdout, done.stderr) == (0, alone.stdout, "")


JOINED = """
import sys
from lfm2kit import joined_job, load_model
with joined_job() as job:
    rank = job.world.rank
    model = load_model("tiny", {backend}, job=job)
    {rest}
    job.barrier()
"""


def test_an_error_on_one_rank_ends_the_program_on_all(tmp_path: Path) -> None:
    program = JOINED.format(backend="'reference'", rest="if rank: [][1]")
    done = python(2, program, tmp_path)
    assert done.returncode != 0
    last = done.stderr.rstrip().rpartition("\n")[2]
    assert re.match(r"lfm2kit: error: rank 1 on .*: IndexError: list index out of range", last)
    assert "in <module>" in done.stderr  # the traceback of the user's program


def test_ranks_that_load_different_models_are_told_so(tmp_path: Path) -> None:
    program = JOINED.format(backend="['reference', 'reference,mlp=cpu_simd'][rank]", rest="")
    done = python(2, program, tmp_path)
    assert done.returncode != 0
    assert "the ranks do not agree: backend is reference on rank 0 and reference,m" in done.stderr


def test_the_exit_code_of_rank_0_is_that_of_the_program(tmp_path: Path) -> None:
    done = python(2, JOINED.format(backend="'reference'", rest="sys.exit(0)"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# A backend that tells of each kernel that it compiles.
COMPILING = """
import os, time, lfm2kit
from lfm2kit.kernel_cache import KernelCache
from lfm2kit.reference.backend import ReferenceBackend

KERNELS = KernelCache("telling")

class Telling(ReferenceBackend):
    def build(self, spec, weights):
        with KERNELS.turn(spec.kind):
            if KERNELS.read(spec.kind) is None:
                with open(os.environ["COMPILED"], "a") as log:
                    print(spec.kind, file=log)
                time.sleep(0.1)
                KERNELS.write(spec.kind, b"code")
        return super().build(spec, weights)

@lfm2kit.hookimpl
def lfm2kit_backends():
    yield lfm2kit.BackendPlugin("telling", "tells", lambda context: Telling(), api_version=1)
"""


def telling(folder: Path) -> dict[str, str]:
    """Install the backend `telling`, and return the environment in which it is found."""
    (folder / "telling_plugin.py").write_text(COMPILING)
    info = folder / "telling_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: telling-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lfm2kit]\ntelling = telling_plugin\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    cache = {"LFM2KIT_CACHE_DIR": str(folder / "cache"), "COMPILED": str(folder / "log")}
    return os.environ | LETS_ANYONE_RUN | {"PYTHONPATH": path} | cache


def test_one_rank_compiles_each_kernel_in_a_warmup_on_ranks(tmp_path: Path) -> None:
    plan = "reference,mlp=telling,conv=telling,experts=telling"
    done = subprocess.run(
        [*LFM2KIT, "warmup", "--ranks", "3", "--backend", plan],
        capture_output=True, text=True, timeout=A_WHILE, env=telling(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.match(rf"{plan}: ready on 3 ranks after .* s\n", done.stdout)
    assert sorted((tmp_path / "log").read_text().split()) == ["conv", "experts", "mlp"]


def test_ranks_of_a_warmup_that_differ_are_told_so() -> None:
    warmup = [*LFM2KIT, "warmup", "--backend", "reference"]
    done = subprocess.run(
        [find_mpiexec(), "-n", "1", *warmup, ":", "-n", "1", *warmup, "--trim"],
        capture_output=True, text=True, timeout=A_WHILE, env=os.environ | LETS_ANYONE_RUN,
    )  # fmt: skip
    assert done.returncode == 2
    assert "do not agree: --trim is not given on rank 0 and given on rank 1" in done.stderr
