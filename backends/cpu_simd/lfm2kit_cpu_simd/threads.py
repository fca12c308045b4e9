"""Which of Numba's threading layers runs the kernels, and how its idle threads wait."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from importlib import import_module

import numba

from lfm2kit.process.machine import cores

# Idle OpenMP threads spin, by default for milliseconds: where other processes want the cores, work
# waits for threads that spin.  This count is enough from one kernel to the next.  libgomp
# reads it once, when the first parallel kernel is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# workqueue, always there, takes fifty times as long to start a parallel region as OpenMP.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

SOFT_PAUSE = 1  # omp_pause_soft: everything is as before, but for the threads

# Asked for before anything runs: with OMP_PROC_BIND the first parallel kernel binds this thread to
# one core, which is then all that it is told of.
CORES = cores()


def threading_notes() -> list[str]:
    """Return what is missing for threads to start fast."""
    for layer in ("omppool", "tbbpool"):
        try:
            import_module(f"numba.np.ufunc.{layer}")
        except ImportError:
            continue
        return []
    return ["there is neither libgomp nor tbb: threads start slowly; install libgomp1, or pip tbb"]


def end_team() -> None:
    """End the threads that this thread's parallel kernels run on, if they are libgomp's."""
    # It fails if no kernel has run yet, without libgomp, and with one older than OpenMP 5.
    with suppress(ValueError, OSError, AttributeError):
        if numba.threading_layer() == "omp":
            ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(SOFT_PAUSE)
