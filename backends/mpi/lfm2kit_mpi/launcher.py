"""Starts MPI jobs, and reads from the environment whether this process is part of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.transport import Transport, rank_command

# What launchers set for each process: Open MPI, MPICH and Intel MPI and Slurm's PMI, MVAPICH.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# What batch systems set in an allocation: there this machine's cores say nothing.
ALLOCATION_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
MOST_PER_CORE = 8  # ranks: more of them only swamp the machine


class MpiLauncher:
    def world_size(self) -> int | None:
        """Read the size from the environment alone, because importing mpi4py would start MPI."""
        for variable in SIZE_VARIABLES:
            if os.environ.get(variable, "").isdigit():
                return int(os.environ[variable])
        # srun's PMIx says no size of its own; Slurm's counts, in a step that has PMIx.
        if "PMIX_RANK" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "").isdigit():
            return int(os.environ["SLURM_STEP_NUM_TASKS"])
        return None

    def launch(self, ranks: int, arguments: Sequence[str]) -> int:
        from lfm2kit_mpi.job import run_job  # here: plugins are imported by every command

        _check_cores(ranks)
        return run_job(on_ranks(ranks, rank_command(arguments)), ranks)

    def connect(self) -> Transport:
        from lfm2kit_mpi.joining import join

        return join(self.world_size() or 1)


def on_ranks(ranks: int, command: Sequence[str]) -> list[str]:
    """Return the command that starts `command` as each of `ranks` ranks."""
    mpiexec = find_mpiexec()
    return [mpiexec, *flags_for(version_of(mpiexec), ranks), "-n", str(ranks), *command]


def _check_cores(ranks: int) -> None:
    cores = os.cpu_count() or 1
    is_allocation = any(name in os.environ for name in ALLOCATION_VARIABLES)
    if ranks > MOST_PER_CORE * cores and not is_allocation:
        raise Lfm2kitError(
            Option("ranks", ranks),
            f": this machine has {cores} cores, enough for {MOST_PER_CORE * cores}; "
            "start more of them on several machines, in an allocation",
        )


def find_mpiexec() -> str:
    """Return this environment's mpiexec (the mpich wheel's), or else the one on the PATH."""
    if find_spec("mpi4py") is None:
        raise Lfm2kitError(Option("ranks"), " needs mpi4py; pip install 'lfm2kit-mpi[mpich]'")
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise Lfm2kitError(
            Option("ranks"),
            " needs mpiexec, and there is none; load the cluster's MPI, or "
            "pip install 'lfm2kit-mpi[mpich]'",
        )
    return found


def version_of(mpiexec: str) -> str:
    """Return what an mpiexec says of itself."""
    said = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False)
    return said.stdout


def flags_for(version: str, ranks: int) -> list[str]:
    """Return the options of the mpiexec that says `version` of itself.

    Open MPI refuses root, and more ranks than cores, unless told, and binds each of two ranks to
    one core, where all of its threads would run.  In an allocation of several nodes, every mpiexec
    would fill one node after the other as far as their slots go.
    """
    on_each = -(-ranks // _nodes())
    if "Open MPI" not in version and "OpenRTE" not in version:
        return ["-ppn", str(on_each)] if _nodes() > 1 else []
    spread = ["--map-by", f"ppr:{on_each}:node"] if _nodes() > 1 else []
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["--oversubscribe", "--bind-to", "none", *spread, *root]


def _nodes() -> int:
    """Return the number of nodes of the allocation that this is in; 1 if it is not known."""
    text = os.environ.get("SLURM_JOB_NUM_NODES", "")
    return max(1, int(text)) if text.isdigit() else 1
