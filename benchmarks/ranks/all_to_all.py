"""Times an all-to-all of this many bytes a rank: what a rank of `links.py` runs.

    mpiexec -n 4 python -m mpi4py all_to_all.py BYTES REPETITIONS

Each rank sends an equal part to each rank, itself included.  Rank 0 prints its times as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from lfm2kit_mpi.launcher import MpiLauncher

WARM_UP = 2  # the first exchanges connect the ranks


def main() -> None:
    nbytes, repetitions = map(int, sys.argv[1:])
    transport = MpiLauncher().connect()
    size = transport.world.size
    rows = np.zeros((size, nbytes // size), np.uint8)
    times = []
    for _ in range(WARM_UP + repetitions):
        transport.barrier()
        start = time.perf_counter()
        transport.all_to_all(rows, [1] * size)
        times.append(time.perf_counter() - start)
    if transport.world.rank == 0:
        print(json.dumps(times[WARM_UP:]))
    transport.finish(0)


if __name__ == "__main__":
    main()
