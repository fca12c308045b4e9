"""Compares what `lfm2kit plan` says of a rank's memory with what its process takes.

    mpiexec -n 4 python benchmarks/ranks/memory.py MODEL -n 64 --batch-size 16 [--ep-size 2]

What the interpreter, its libraries and kernels take is measured with the embedded model, and left
out.  All figures are proportional set sizes (Linux's smaps_rollup) without the pages of files: rows
of the embedding are read where the file is mapped, and the system can drop these pages.
"""

from __future__ import annotations

import argparse
import gc
import re
import threading
from pathlib import Path

import numpy as np
from lfm2kit_mpi.launcher import MpiLauncher

from lfm2kit.building.loading import find_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.measuring.gathering import gathered_bytes
from lfm2kit.measuring.running import run_samples
from lfm2kit.transport import Transport

SEQ_LEN = 16
ROLLUP = "/proc/self/smaps_rollup"
PAUSE = 0.004  # seconds between two looks


def proportional_bytes() -> int:
    """Return this process's memory; what it shares counts in parts."""
    found = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+)", Path(ROLLUP).read_text(), re.MULTILINE)
    assert len(found) == 2
    return 1024 * sum(map(int, found))


class Peak(threading.Thread):
    """A thread that keeps the largest memory that it has seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._is_over = 0, threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(PAUSE):
            self.bytes = max(self.bytes, proportional_bytes())

    def end(self) -> int:
        self._is_over.set()
        self.join()
        return max(self.bytes, proportional_bytes())


def taken(transport: Transport, options: Options, n: int, batch: int) -> tuple[int, int, int]:
    """Run a model; return the bytes planned, those after it was built, and the most meanwhile."""
    checkpoint = open_checkpoint(find_model(options.model), [])
    tokens = min(n, batch) * SEQ_LEN
    setup = set_up(checkpoint, options, transport=transport, tokens=tokens)
    planned = sum(setup.sizes.needed(setup.placed, "host", tokens))
    if transport.world.rank == 0:
        planned += gathered_bytes(n, checkpoint.spec.lm_head.vocab_size)
    ids = np.random.default_rng(0).integers(
        0, checkpoint.spec.embed_tokens.vocab_size, (n, SEQ_LEN), dtype=np.int32
    )
    model = setup.build(tokens=tokens)
    transport.barrier()
    built, peak = proportional_bytes(), Peak()
    peak.start()
    run_samples(model, ids, batch, transport=transport)
    return planned, built, peak.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--backend", default="cpu_simd")
    parser.add_argument("--parallel", default="auto")
    parser.add_argument("--ep-size", type=int)
    asked = parser.parse_args()
    transport = MpiLauncher().connect()

    def options(model: str) -> Options:
        return Options(
            model=model, backend=asked.backend, threads=1, parallel=asked.parallel,
            ep_size=asked.ep_size,
        )  # fmt: skip

    taken(transport, options("tiny"), asked.n, 1)
    gc.collect()
    base = proportional_bytes()
    planned, *measured = taken(transport, options(asked.model), asked.n, asked.batch_size)
    mine = [planned, *(one - base for one in measured)]
    everyones = transport.gather(np.array([mine], np.float64))
    if everyones is not None:
        print("rank  planned  built   most  (MB)  most / planned")
        for rank, (planned, built, most) in enumerate(everyones / 1e6):
            print(f"{rank:4} {planned:8.1f} {built:6.1f} {most:6.1f} {most / planned:21.3f}")
    transport.finish(0)


if __name__ == "__main__":
    main()
