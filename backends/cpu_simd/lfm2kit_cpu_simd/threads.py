"""How many threads, and on which of Numba's threading layers."""

from __future__ import annotations

import os
from importlib import import_module

import numba

from lfm2kit.backend import Context
from lfm2kit.errors import Lfm2kitError

# Idle OpenMP threads spin, by default for milliseconds: where other processes want the cores, what
# is to be done waits for what spins.  This long is enough from one kernel to the next.  libgomp
# reads it once, when the first parallel kernel is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# workqueue, always there, takes fifty times as long to start a parallel region as OpenMP.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

# Asked for before anything runs: with OMP_PROC_BIND the first parallel kernel binds this thread to
# one core, which is then all that it is told of.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threading_notes() -> list[str]:
    """What is missing for threads to start fast."""
    for layer in ("omppool", "tbbpool"):
        try:
            import_module(f"numba.np.ufunc.{layer}")
        except ImportError:
            continue
        return []
    return ["there is neither libgomp nor tbb: threads start slowly; install libgomp1, or pip tbb"]


def set_threads(context: Context) -> None:
    """The asked-for number, or this rank's share of the cores that the process may use."""
    most = numba.config.NUMBA_NUM_THREADS
    if context.threads is not None and context.threads > most:
        raise Lfm2kitError(
            f"--threads {context.threads}: this process may use {most} "
            "(cores of its affinity mask, or NUMBA_NUM_THREADS)"
        )
    numba.set_num_threads(context.threads or max(1, min(most, CORES // context.local_ranks)))
