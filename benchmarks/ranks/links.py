"""Measures how long ranks take over links of different rates, on nodes of `scripts/network.py`.

    python benchmarks/ranks/links.py
    python benchmarks/ranks/links.py --model wide-6 -n 16,64 --rates none,200mbit -r 5

Prints JSON with all times in seconds and their medians: of an all-to-all of 8 MiB a rank on four
nodes, with the least time that the links allow, and of `lfm2kit run` on two nodes with one thread
each.  Rates are measured alternately, one job of each after the other.  The first time it writes a
checkpoint of 6.8 GB with random weights to benchmarks/.data, or to LFM2KIT_BENCH_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lfm2kit_mpi.launcher import find_mpiexec

from lfm2kit.records import values

HERE = Path(__file__).resolve().parent
NETWORK = HERE.parents[1] / "scripts" / "network.py"
DATA = Path(os.environ.get("LFM2KIT_BENCH_DATA", HERE.parent / ".data"))
NO_LIMIT = "none"
BITS_PER_SECOND = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
NBYTES = 8 << 20  # of an all-to-all, from each rank
EXCHANGING, RUNNING = 4, 2  # nodes, with a rank each
EXCHANGES = 5  # of each job
LENGTH = 16  # tokens of a sample


def on_nodes(nodes: int, rate: str, *command: str) -> Any:
    """Return what a command prints as JSON, which it runs on nodes with links of this rate."""
    limit = [] if rate == NO_LIMIT else ["--rate", rate]
    words = [sys.executable, str(NETWORK), "--nodes", str(nodes), *limit, "--", *command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode}: {' '.join(words)}")
    return json.loads(done.stdout)


def all_to_all(rate: str) -> list[float]:
    program = [sys.executable, "-m", "mpi4py", str(HERE / "all_to_all.py")]
    job = [find_mpiexec(), "-n", str(EXCHANGING), *program, str(NBYTES), str(EXCHANGES)]
    times: list[float] = on_nodes(EXCHANGING, rate, *job)
    return times


def run(model: Path, n: int, rate: str) -> list[float]:
    """Return the time of a run on two ranks of one thread each."""
    options = f"--ranks {RUNNING} --threads 1 -n {n} --random-inputs {LENGTH} -w --json -"
    options += " --parallel ep --overlap off"
    given = ["--model", str(model), "--backend", "cpu_simd", *options.split()]
    record = on_nodes(RUNNING, rate, sys.executable, "-m", "lfm2kit", "run", *given)
    return values(record, "time")


def alternately(
    measure: Callable[[str], Sequence[float]], rates: Sequence[str], repetitions: int
) -> dict[str, list[float]]:
    """Return the times of each rate, measured one rate after the other, again and again."""
    times: dict[str, list[float]] = {rate: [] for rate in rates}
    for _ in range(repetitions):
        for rate in rates:
            times[rate] += measure(rate)
            print(f"{rate}: {times[rate][-1]:.3f} s", file=sys.stderr, flush=True)
    return times


def least_seconds(rate: str) -> float:
    """Return how long a link takes for what its rank sends to others in an all-to-all."""
    if rate == NO_LIMIT:
        return 0.0
    per_second = float(rate[:-4]) * BITS_PER_SECOND[rate[-4:]]
    return NBYTES * (EXCHANGING - 1) / EXCHANGING * 8 / per_second


def with_medians(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    return {
        rate: {"median": statistics.median(of_rate), "seconds": list(of_rate)}
        for rate, of_rate in times.items()
    }


def checkpoint(name: str) -> Path:
    """Return a folder with random weights in FP32, which is written if it is not there."""
    folder = DATA / f"{name}-F32"
    if not folder.exists():
        DATA.mkdir(parents=True, exist_ok=True)
        convert = ["convert", name, str(folder), "--random", "--dtype", "F32"]
        subprocess.run([sys.executable, "-m", "lfm2kit", *convert], check=True, stdout=sys.stderr)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="wide-6", help="a name that lfm2kit convert knows")
    parser.add_argument("-n", default="64", help="numbers of samples, such as 16,64")
    parser.add_argument("--rates", default=f"{NO_LIMIT},1gbit,200mbit")
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="jobs of each rate")
    options = parser.parse_args()
    rates, model = options.rates.split(","), checkpoint(options.model)
    exchanges = with_medians(alternately(all_to_all, rates, options.repetitions))
    for rate, measured in exchanges.items():
        measured["least"] = least_seconds(rate)
    runs = {
        n: with_medians(alternately(partial(run, model, n), rates, options.repetitions))
        for n in map(int, options.n.split(","))
    }
    print(json.dumps({"all_to_all": exchanges, options.model: runs}, indent=2))


if __name__ == "__main__":
    main()
