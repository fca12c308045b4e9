"""Measures what a load and replicas bring to ranks with a GPU each, where some experts are hot.

    python benchmarks/ranks/skew.py --ranks 4 -n 64

It starts a job of its own with LFM2-8B-A1B at full size and random weights.  Tokens choose experts
unevenly, by the `--bias-std` of the router's bias.  One process records the load of other token
ids.  Prints Markdown: the rows of the busiest rank over an average one's, weights on a rank, and
the samples/s of n samples of 16 tokens as medians, without the gather of logits.

| kind | |
|---|---|
| none | experts shared out in their order |
| load | experts shared out by the load |
| replicas | by the load, and every rank has the hottest experts of each layer |
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpus import LENGTH, Ranks, batches, vocab_size_of
from lfm2kit_mpi.launcher import MpiLauncher, on_ranks

from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.measuring import exchanged
from lfm2kit.ranks.joining import settled_alike
from lfm2kit.rewrites.recorded_load import LoadRecorder
from lfm2kit.transport import Sent


class Measured(NamedTuple):
    """What became of one kind, on rank 0."""

    samples_per_second: float
    max_over_mean: float
    weights: int  # bytes on this rank
    logits: Any


def kinds_of(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    load = {"load": Path(asked.load)}
    return {"none": {}, "load": load, "replicas": load | {"replicate_experts": asked.replicas}}


def record_load(ranks: Ranks, path: Path) -> None:
    """Write the load of samples that are not measured; the other ranks wait for it."""
    asked = ranks.arguments
    if ranks.rank == 0:
        recorder, checkpoint = LoadRecorder(), ranks.checkpoint
        options = Options(backend=asked.backend, precision=asked.precision)
        model = set_up(checkpoint, options, rewrites=[recorder.rewrite()]).build()
        size = asked.n, LENGTH
        ids = np.random.default_rng(asked.n + 1).integers(0, vocab_size_of(ranks), size)
        model.logits(Batch.of_sequences(ids.tolist()))
        load = recorder.load("random", checkpoint.spec, None)
        assert load is not None, "this is the first rank"
        path.write_text(json.dumps(load.document()))
    ranks.transport.barrier()


def measured(ranks: Ranks, kind: dict[str, Any]) -> Measured | None:
    asked = ranks.arguments
    options = Options(
        backend=asked.backend, precision=asked.precision,
        parallel="ep", exchange=asked.exchange, **kind,
    )  # fmt: skip
    transport = ranks.transport
    setup: Setup = settled_alike(transport, set_up(ranks.checkpoint, options, transport=transport))
    model, (_, mine) = setup.build(), batches(ranks, asked.n)
    seconds = ranks.seconds(partial(model.logits, mine))
    exchanged.begin(model)
    logits = transport.gather(model.logits(mine))
    counts = exchanged.ended(model, transport, Sent(), [range(ranks.size)])
    if counts is None:
        return None
    weights = sum(setup.sizes.kept(leaf) or 0 for leaf in setup.placed.leaves())
    return Measured(asked.n / seconds, counts.imbalance() or 0.0, weights, logits)


def table(ranks: Ranks) -> Iterator[str]:
    """Yield the lines of the table, on rank 0."""
    yield "| kind | rows max/mean | weights, GB | samples/s | of none | bits |"
    yield "|---|---|---|---|---|---|"
    first: Measured | None = None
    for name, kind in kinds_of(ranks.arguments).items():
        found = measured(ranks, kind)
        if found is None:
            continue
        first = first or found
        rate, bits = found.samples_per_second, np.array_equal(found.logits, first.logits)
        cells = (
            name, f"{found.max_over_mean:.2f}", f"{found.weights / 1e9:.1f}", f"{rate:.0f}",
            f"{rate / first.samples_per_second:.2f}", "same" if bits else "**other**",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("-n", type=int, default=64, help="samples of all ranks together")
    parser.add_argument("--replicas", type=int, default=4, help="hottest experts of each layer")
    parser.add_argument("--bias-std", type=float, default=0.14)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--exchange", default="device")
    parser.add_argument("-r", "--repetitions", type=int, default=20)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--model", help="a checkpoint instead of the full size")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # where the job keeps its load
    asked = parser.parse_args()
    if MpiLauncher().world_size() is None:
        with tempfile.TemporaryDirectory() as folder:
            load = ["--load", str(Path(folder) / "load.json")]
            command = on_ranks(asked.ranks, [sys.executable, *sys.argv, *load])
            sys.exit(subprocess.run(command, check=False).returncode)
    ranks = Ranks(asked)
    record_load(ranks, Path(asked.load))
    for line in table(ranks):
        ranks.say(line)
    ranks.transport.finish(0)


if __name__ == "__main__":
    main()
