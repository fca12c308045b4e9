"""Recognises from the environment that a launcher started this process as one of several.

A launcher may start several processes without making them ranks of one job.  Each of them would
then do the whole run.  A transport cannot notice that, because it sees no job.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

SLURM = "srun"
MPIEXEC = "start them with the mpiexec of mpi4py's MPI"

DEFAULT_TRANSPORT = "mpi"  # what the ranks of a job talk over if nobody says more


class Launcher(NamedTuple):
    """A program that starts processes, and the variables that it sets for each of them."""

    name: str
    rank: str
    size: str | None  # None if this launcher does not say how many processes there are
    advice: str = MPIEXEC  # what to type to get ranks


class Started(NamedTuple):
    """The place of this process among at least `size` that a launcher started."""

    launcher: Launcher
    rank: int
    size: int

    def __str__(self) -> str:
        return f"{self.launcher.name} started {self.size} processes ({self.evidence})"

    @property
    def is_first_to_know(self) -> bool:
        """Return whether this is the lowest rank that knows that there are several."""
        return self.rank == (0 if self.launcher.size is not None else 1)

    @property
    def evidence(self) -> str:
        """Return the environment variable that shows it, with its value."""
        name = self.launcher.size or self.launcher.rank
        return f"{name}={os.environ[name]}"


# The innermost launcher first: MPICH's mpiexec, for one, starts its helpers with srun.
LAUNCHERS = (
    Launcher("mpiexec", "PMI_RANK", "PMI_SIZE"),
    Launcher("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    Launcher("mpirun_rsh", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    Launcher("torchrun", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    Launcher(
        SLURM,
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",  # SLURM_NTASKS is set in every shell of an allocation
        "type srun --mpi=pmi2 or --mpi=pmix (srun --mpi=list shows what is available)",
    ),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    Launcher("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    Launcher("aprun", "ALPS_APP_PE", None),
    Launcher("mpiexec", "PALS_RANKID", None),
    Launcher("prun", "PMIX_RANK", None),
)


def started() -> Started | None:
    """Return this process's place among those of a launcher; None if it is alone.

    If the launcher does not say how many there are, its first process counts as alone.
    """
    found = (_by(launcher) for launcher in LAUNCHERS)
    innermost = next((one for one in found if one is not None), None)
    return innermost if innermost is not None and innermost.size > 1 else None


def _by(launcher: Launcher) -> Started | None:
    rank = _number(launcher.rank)
    if rank is None or (launcher.name == SLURM and _is_interactive_shell()):
        return None
    size = rank + 1 if launcher.size is None else _number(launcher.size)
    return None if size is None else Started(launcher, rank, size)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def _is_interactive_shell() -> bool:
    """Return whether this runs in the shell of `srun --pty bash`, which starts it only once."""
    return "SLURM_PTY_PORT" in os.environ and sys.stdin is not None and sys.stdin.isatty()
