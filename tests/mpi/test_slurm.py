"""Jobs under a real Slurm, whose four nodes are daemons of these tests on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.mpi.test_faults import A_WHILE, LFM2KIT

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec, version_of

pytestmark = pytest.mark.mpi
ROOT = Path(__file__).parents[2]
NODES = ("n1", "n2", "n3", "n4")
RUN = ["run", "-v", "-n", "8", "--backend", "reference", "--json", "-"]
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"  # where daemons are
NEEDED = ("slurmctld", "slurmd", "srun", "salloc", "sinfo", "setpriv")

# No daemon of another kind is needed: processes trust each other's word for who their user is.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PartitionName=all Nodes=ALL Default=YES OverSubscribe=FORCE:4
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000\n"


@pytest.fixture(scope="module", autouse=True)
def _slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a controller and the nodes' daemons, and make them the Slurm of every command here."""
    for tool in NEEDED:
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"there is no {tool} here; Debian's packages are slurm-wlm, slurm-client")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    if "SLURM_JOB_ID" in os.environ:
        pytest.skip("this is an allocation of another Slurm")
    if "HYDRA" not in version_of(find_mpiexec()):
        pytest.skip("PMI-2 and the nodes that srun sets up are tested with MPICH's mpiexec")
    folder = tmp_path_factory.mktemp("slurm")
    conf = configured(folder)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(conf))
        patch.setenv("PATH", PATH)
        log = stack.enter_context((folder / "log").open("wb"))
        for daemon in (["slurmctld"], *(["slurmd", "-N", name] for name in NODES)):
            stack.enter_context(running([*daemon, "-D"], log))
        until_idle(folder / "log")
        yield


def configured(folder: Path) -> Path:
    """Write Slurm's configuration, and return its path."""
    host = socket.gethostname().partition(".")[0]
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("", 0))) for _ in ("controller", *NODES)]
        ports = [one.getsockname()[1] for one in taken]
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    nodes = zip(NODES, ports[1:], strict=True)
    conf.write_text(
        "".join(NODE.format(name=name, host=host, port=port) for name, port in nodes)
        + CONF.format(host=host, folder=folder, ports=ports)
    )
    return conf


@contextmanager
def running(command: list[str], log: IO[bytes]) -> Iterator[None]:
    """Run a daemon, which ends with this block, and with this process however that ends."""
    ending = ["setpriv", "--pdeathsig", "TERM"]
    with subprocess.Popen([*ending, *command], stdout=log, stderr=log) as daemon:
        try:
            yield
        finally:
            daemon.terminate()


def until_idle(log: Path) -> None:
    for _ in range(100):
        said = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True)
        if said.stdout.split() == [b"4"]:
            return
        time.sleep(0.1)
    pytest.fail(f"Slurm's nodes are not ready: {log.read_text()[-2000:]}")


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=A_WHILE, env=environment)


@pytest.mark.parametrize(
    "command",
    [
        ["srun", "--mpi=pmi2", "-N4", "-n4", *LFM2KIT, *RUN],
        ["salloc", "-N4", "-n4", "mpiexec", "-n", "4", *LFM2KIT, *RUN],
        ["salloc", "-N4", "-n4", *LFM2KIT, *RUN, "--ranks", "4"],
        ["env", "NODES=4", str(ROOT / "run.sh"), *RUN[1:]],
    ],
    ids=["srun", "mpiexec-in-an-allocation", "ranks-in-an-allocation", "run.sh"],
)
def test_four_nodes_of_slurm_run_one_valid_job(command: list[str]) -> None:
    words = [find_mpiexec() if word == "mpiexec" else word for word in command]
    for attempt in range(4):
        # What lies in memory behind an address also depends on the environment.
        done = run(*words, ATTEMPT="x" * 100 * attempt)
        if not cut_short(done):
            break
    else:
        pytest.skip("Slurm has cut lines of MPICH's short in every attempt")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["ranks"], record["validation"]["valid"]) == (4, True)


def cut_short(done: subprocess.CompletedProcess[str]) -> bool:
    """Return whether Slurm has misread a line of MPICH's, which is nothing that lfm2kit can mend.

    MPICH sends each rank's address with whatever lay in memory behind it.  Slurm reads up to 1024
    bytes of a line, which are enough only if that has many zeros.
    """
    return "mpi/pmi2: " in done.stderr  # Slurm's own errors, of which the first names the line


def test_ranks_are_spread_over_the_nodes_whatever_slots_these_have() -> None:
    show = ["sh", "-c", "printf '%s\\n' $SLURMD_NODENAME"]
    done = run("salloc", "-N4", "-n8", *on_four_ranks(show))
    assert sorted(done.stdout.split()) == list(NODES), done.stderr


def on_four_ranks(command: list[str]) -> list[str]:
    """Return a command that starts `command` as --ranks 4 starts its ranks."""
    code = (
        "import subprocess, sys; from lfm2kit_mpi.launcher import on_ranks; "
        "sys.exit(subprocess.call(on_ranks(4, sys.argv[1:])))"
    )
    return [sys.executable, "-c", code, *command]


def test_copies_that_srun_did_not_make_ranks_are_refused_once() -> None:
    done = run("srun", "-N4", "-n4", *LFM2KIT, *RUN)
    assert done.returncode == 2
    assert done.stderr.count("lfm2kit: error: srun started 4 processes") == 1
    assert "srun --mpi=pmi2" in done.stderr
