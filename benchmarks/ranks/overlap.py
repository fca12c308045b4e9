"""Measures forwards of a job with and without overlap of exchange and computation, alternately.

    scripts/network.py --nodes 2 --rate 200mbit -- \\
        mpiexec -n 2 python benchmarks/ranks/overlap.py MODEL -n 64 -r 5

MODEL is a checkpoint with MoE layers, such as `benchmarks/ranks/links.py` writes.  A rank has one
thread.  Rank 0 prints JSON: seconds of each run of n samples of 16 tokens, by kind, and what was
spent in the exchange by the rank that waits least, in the gather of logits, and in all the rest,
which is computation.  With --batch-size a run has several forwards; it is then also measured with
batches that wait until their logits have been gathered.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import numpy as np
from lfm2kit_mpi.launcher import MpiLauncher

from lfm2kit.building.loading import find_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.measuring.running import Timed, run_samples
from lfm2kit.transport import Transport

LENGTH = 16  # tokens of a sample
OPERATIONS = ("counts", "dispatch", "combine")


class Waiting:
    """A transport that does not work aside."""

    def __init__(self, transport: Transport) -> None:
        self.world = transport.world
        self.all_to_all = transport.all_to_all
        self.gather = transport.gather
        self.barrier = transport.barrier


def parts(timed: Timed) -> dict[str, float]:
    """Return where the time of a run went."""
    assert timed.exchanged is not None
    document = timed.exchanged.document(timed.seconds)
    operations = [layer[name] for layer in document["layers"] for name in OPERATIONS]
    exchange = sum(min(operation["seconds"]) for operation in operations)
    gather = min(document["gather"]["seconds"])
    waited = min(document["waited_seconds"])
    rest = timed.seconds - exchange - gather - waited
    return {"exchange": exchange, "gather": gather, "rest": rest}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("-n", type=int, default=64, help="samples of a run")
    parser.add_argument("-b", "--batch-size", type=int, help="samples of a rank's forward")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="runs of each kind")
    options = parser.parse_args()
    transport = MpiLauncher().connect()
    checkpoint = open_checkpoint(find_model(options.model), [])
    chosen = Options(backend="cpu_simd", threads=1, parallel="ep", overlap="on")
    model = set_up(checkpoint, chosen, transport=transport).build()
    vocab_size = checkpoint.spec.embed_tokens.vocab_size
    inputs = np.random.default_rng(0).integers(0, vocab_size, (options.n, LENGTH), np.int32)
    kinds: dict[str, tuple[bool, Any]] = {"off": (False, transport), "on": (True, transport)}
    if options.batch_size is not None:
        waiting = Waiting(transport)
        kinds |= {"off, gather waits": (False, waiting), "on, gather waits": (True, waiting)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    where: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for repetition in range(options.repetitions + 1):
        for kind, (model.overlap.is_on, over) in kinds.items():
            timed = run_samples(model, inputs, options.batch_size or options.n, transport=over)
            if repetition == 0 or transport.world.rank > 0:  # the first one warms up
                continue
            seconds[kind].append(timed.seconds)
            where[kind].append(parts(timed))
    if transport.world.rank == 0:
        medians = {
            kind: {"all": median(seconds[kind])}
            | {name: median(one[name] for one in of_kind) for name in of_kind[0]}
            for kind, of_kind in where.items()
        }
        print(json.dumps({"medians": medians, "seconds": seconds}))
    transport.finish(0)


if __name__ == "__main__":
    main()
