"""Experts where they fit: a limited GPU memory, full-size LFM2-8B-A1B with random weights.

    python benchmarks/hybrid/experts.py --gpu-memory 24GiB -n 1,16,64,128
    python benchmarks/hybrid/experts.py --gpu-memory 24GiB --streamed 0,32,4,8 --output times.json

Contenders are numbers of streamed experts of each layer: 0 computes all that do not fit on the CPU,
32 streams all of them.  `rates` chooses by what is measured here first, for the number of tokens.
All of them know how often each expert is chosen, from other batches of random tokens.  Each is a
process of its own, as a user's run is: threads of several models in one process would be more than
cores.  They run one after the other, forward by forward, and their logits may differ by rounding
alone.  Prints Markdown tables: where experts are, what is predicted, what is measured, and the peak
GPU memory of each process, its context included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
from full_size import STORED_AS, RandomTensors

from lfm2kit.backend import Weights
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.measuring.bench import random_batch
from lfm2kit.measuring.calibration import calibrated, measurable
from lfm2kit.rewrites import SplitExperts
from lfm2kit.rewrites.recorded_load import LoadRecorder

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LENGTH = 16  # tokens of a sample
WARM_UP = 3  # the first forward of a form compiles, the second is captured
LOAD_SAMPLES, LOAD_BATCHES = 64, 8
MOST_DIFFERENCE = 1e-3  # of logits
RATES = "rates"
HEADER = """
| n | streamed | resident / streamed / host | captured | predicted ms | ms | samples/s | GPU GB \
| private host GB |
|---|---|---|---|---|---|---|---|---|"""
SPAWN = multiprocessing.get_context("spawn")


def checkpoint(stored_as: str) -> Checkpoint:
    spec = model_spec(LFM2_8B_A1B, tied=True)
    tensors = RandomTensors(spec.parameters(), STORED_AS[stored_as])
    return Checkpoint(Path("random"), spec, Weights(dict(tensors)), LFM2_8B_A1B)


def measured_rates(there: Checkpoint, backend: str, precision: str) -> Path:
    """Return a file with the rates of this machine."""
    start = time.perf_counter()
    setup = set_up(there, Options(backend=backend, precision=precision))
    calibration, waited = calibrated(setup, measurable(setup))
    path = Path(tempfile.mkdtemp()) / "rates.json"
    path.write_text(json.dumps(calibration.document()))
    seconds = time.perf_counter() - start
    print(f"rates measured in {seconds:.0f} s, waiting {waited:.0%} for cores: {path}", flush=True)
    return path


def recorded_load(there: Checkpoint, backend: str, precision: str) -> Path:
    """Return a file with the load of some batches, computed with all experts on the GPU."""
    recorder = LoadRecorder()
    asked = Options(backend=backend, precision=precision)
    setup = set_up(there, asked, rewrites=[recorder.rewrite()], tokens=LOAD_SAMPLES * LENGTH)
    model = setup.build(tokens=LOAD_SAMPLES * LENGTH)
    for seed in range(LOAD_BATCHES):
        model.logits(random_batch(LOAD_SAMPLES, LENGTH, LFM2_8B_A1B.vocab_size, seed=1000 + seed))
    load = recorder.load("random", there.spec, None)
    assert load is not None
    path = Path(tempfile.mkdtemp()) / "load.json"
    path.write_text(json.dumps(load.document()))
    return path


def used_bytes() -> int:
    """Return the bytes of the GPU that are used, by whatever process."""
    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


def contender(name: str, n: int, rates: Path, load: Path, options: Any, pipe: Connection) -> None:
    """Build a model, tell of it, and send the logits and seconds of a forward when asked to."""
    there, tokens = checkpoint(options.stored_as), n * LENGTH
    asked = Options(
        backend=options.backend,
        precision=options.precision,
        gpu_memory=options.gpu_memory,
        rates=rates,
        load=load,
        threads=options.threads,
        streamed_experts=None if name == RATES else int(name),
    )
    setup = set_up(there, asked, tokens=tokens)
    model = setup.build(tokens=tokens)
    for _ in range(WARM_UP):
        model.logits(random_batch(n, LENGTH, LFM2_8B_A1B.vocab_size, seed=n))
    predicted = None if setup.sharing is None else setup.sharing.seconds
    pipe.send((where(setup), model._captures is not None, predicted, private_bytes()))
    batch = random_batch(n, LENGTH, LFM2_8B_A1B.vocab_size, seed=n)
    while pipe.recv():
        start = time.perf_counter()
        logits = model.logits(batch)
        pipe.send((time.perf_counter() - start, logits))


def private_bytes() -> int:
    """Return the bytes of the host's memory that this process shares with no other."""
    smaps = Path("/proc/self/smaps_rollup").read_text()
    kilobytes = (line.split()[1] for line in smaps.splitlines() if line.startswith("Private_"))
    return 1024 * sum(map(int, kilobytes))


class Contender:
    """A process with a model."""

    def __init__(self, name: str, *given: Any) -> None:
        before = used_bytes()
        self.name = name
        self._pipe, its = multiprocessing.Pipe()
        self._process = SPAWN.Process(target=contender, args=(name, *given, its), daemon=True)
        self._process.start()
        its.close()
        self.where, self.is_captured, self.predicted, self.host_bytes = self._pipe.recv()
        self.gpu_bytes = used_bytes() - before

    def forward(self) -> tuple[float, Any]:
        """Return the seconds of a forward, and its logits."""
        self._pipe.send(True)
        seconds, logits = self._pipe.recv()
        return seconds, logits

    def close(self) -> None:
        self._pipe.send(False)
        self._process.join()


def where(setup: Setup) -> str:
    """Return how many experts are resident, streamed and on the host, in all layers together."""
    splits = [one.spec for one in setup.placed.tree() if isinstance(one.spec, SplitExperts)]
    counts = [
        sum(len(getattr(spec, role)) for spec in splits)
        for role in ("resident", "streamed", "host")
    ]
    slots = next((f", {s.slots} slots of {s.experts_per_slot}" for s in splits if s.streamed), "")
    return " / ".join(map(str, counts)) + slots


def times_in_turns(contenders: list[Contender], repetitions: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(repetitions):
        logits = {}
        for i in sorted(range(len(contenders)), reverse=turn % 2 == 1):
            seconds, logits[i] = contenders[i].forward()
            times[i].append(seconds)
        for other in logits.values():
            assert np.abs(other - logits[0]).max() <= MOST_DIFFERENCE, "other logits"
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="hybrid")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--stored-as", default="F32", choices=STORED_AS)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--streamed", default=f"0,32,{RATES}", help="numbers, or rates")
    parser.add_argument("--rates", type=Path, help="a file of lfm2kit calibrate")
    parser.add_argument("--load", type=Path, help="a file of lfm2kit run --record-load")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-n", default="16,64,128")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file of all times")
    options = parser.parse_args()
    there = checkpoint(options.stored_as)
    rates = options.rates or measured_rates(there, options.backend, options.precision)
    load = options.load or recorded_load(there, options.backend, options.precision)
    print(HEADER, flush=True)
    records = []
    for n in map(int, options.n.split(",")):
        names = options.streamed.split(",")
        contenders = [Contender(name, n, rates, load, options) for name in names]
        all_times = times_in_turns(contenders, options.repetitions)
        for one, times in zip(contenders, all_times, strict=True):
            median = statistics.median(times)
            predicted = "" if one.predicted is None else f"{1e3 * one.predicted:.1f}"
            row = (
                n, one.name, one.where, one.is_captured, predicted, f"{1e3 * median:.1f}",
                f"{n / median:.0f}", f"{one.gpu_bytes / 1e9:.2f}", f"{one.host_bytes / 1e9:.2f}",
            )  # fmt: skip
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            records.append({"n": n, "streamed": one.name, "seconds": times,
                            "predicted": one.predicted, "gpu_bytes": one.gpu_bytes,
                            "private_host_bytes": one.host_bytes})  # fmt: skip
            one.close()
    if options.output is not None:
        options.output.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
