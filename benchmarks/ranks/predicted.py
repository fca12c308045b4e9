"""Compares predicted forwards with measured ones, from calibrations that saw none of these runs.

    python benchmarks/ranks/predicted.py --model benchmarks/.data/wide-6-F32 --out DIR
    python benchmarks/ranks/predicted.py --model MODEL --out DIR --only 2,200mbit   # one case
    python benchmarks/ranks/predicted.py --model FULL --backend cuda --precision bf16 --links here \
        --ranks 1,2 --layouts dp,ep -n 16,32,64,128 --threads 0 --out DIR

For each number of ranks and each link: a calibration, and then runs with other token ids, all with
as many threads a rank.  With --alone there is only the calibration of one rank, and links are given
by name.  Links are those of `scripts/network.py`, with a rank on each node; `here` is this machine
without any.  Tokens choose experts by a load that one process records, with ids of its own.  What
was calibrated or run is kept in DIR, and is not done again.

Prints a table of seconds: predicted, measured, and both by part, of an average rank.  The 2, 4, 8
and 16 ranks of --bytes run the embedded model, and their messages are compared with those that
follow from its routing: they are equal, or this ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lfm2kit.building.loading import EMBEDDED, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.measuring import samples
from lfm2kit.measuring.exchanged import OPERATIONS
from lfm2kit.measuring.running import run_samples
from lfm2kit.measuring.scaling import parts_of
from lfm2kit.ranks.groups import Grouping
from lfm2kit.records import values
from lfm2kit.simulating.jobs import Job, Layout
from lfm2kit.simulating.routing import RoutingRecorder
from lfm2kit.transport import Sent

NETWORK = Path(__file__).resolve().parents[2] / "scripts" / "network.py"
HERE, NO_LIMIT = "here", "none"
KERNEL = "5gbit"  # what is copied through the kernel of two cores without a limit: `links.py`
LENGTH = 16  # tokens of a sample
RUN_SEED, LOAD_SEED = 0, 1  # of token ids
LOAD_SAMPLES = 64


class Case(NamedTuple):
    """A run to predict and to measure."""

    ranks: int
    link: str
    layout: str
    n: int


class Bench:
    """The commands of one benchmark, whose results are files in a folder."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self._asked = asked
        self._folder = Path(asked.out)
        self._folder.mkdir(parents=True, exist_ok=True)
        threads = ["--threads", str(asked.threads)] if asked.threads else []
        how = ["--backend", asked.backend, "--precision", asked.precision, *threads]
        self._common = ["--model", asked.model, *how]

    def load(self) -> Path:
        path = self._folder / "load.json"
        ids = f"--random-inputs {LENGTH} -n {LOAD_SAMPLES} --seed {LOAD_SEED}".split()
        return self._made(path, ["run", *self._common, *ids, "--record-load", str(path)])

    def calibration(self, ranks: int, link: str) -> Path:
        path = self._folder / f"rates-{ranks}-{link}.json"
        command = ["calibrate", *self._common, "--output", str(path), *_ranks(ranks)]
        return self._made(path, command, ranks, link)

    def predicted(self, case: Case) -> dict[str, Any]:
        per_node = case.ranks if case.link == HERE else 1
        asked = f"ranks={case.ranks},n={case.n},per-node={per_node},tokens={LENGTH},placement=order"
        if self._asked.alone and case.link != HERE:
            asked += f",link={KERNEL if case.link == NO_LIMIT else case.link}"
        of = (1, HERE) if self._asked.alone else (case.ranks, case.link)
        files = ["--rates", str(self.calibration(*of)), "--load", str(self.load())]
        command = ["plan", *self._common, *files, "--simulate", asked, "--json", "-"]
        done = subprocess.run(_lfm2kit(command), stdout=subprocess.PIPE, check=True)
        jobs = json.loads(done.stdout)["jobs"]
        return next(job for job in jobs if job["layout"] == case.layout or case.ranks == 1)

    def measured(self, case: Case) -> list[dict[str, Any]]:
        """Return what some runs of a case have written."""
        how = ["--parallel", case.layout, "--overlap", "off"] if case.ranks > 1 else []
        ids = f"--random-inputs {LENGTH} -n {case.n} --batch-size {case.n} --seed {RUN_SEED}"
        found = []
        for number in range(self._asked.repetitions):
            path = self._folder / f"run-{'-'.join(map(str, case))}-{number}.json"
            run = ["run", *self._common, *ids.split(), *how, "-w", "--json", str(path)]
            self._made(path, [*run, *_ranks(case.ranks)], case.ranks, case.link)
            found.append(json.loads(path.read_text()))
        return found

    def _made(self, path: Path, command: list[str], ranks: int = 1, link: str = HERE) -> Path:
        """Run a command that writes `path`, on nodes with these links, unless it is there."""
        if path.exists():
            return path
        rate = [] if link in (HERE, NO_LIMIT) else ["--rate", link]
        nodes = [sys.executable, str(NETWORK), "--nodes", str(ranks), *rate, "--"]
        words = [*([] if link == HERE or ranks == 1 else nodes), *_lfm2kit(command)]
        print("*", *words, file=sys.stderr, flush=True)
        done = subprocess.run(words, stdout=subprocess.DEVNULL, env=_environment(), check=False)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}: {' '.join(words)}")
        return path


def _environment() -> dict[str, str]:
    """Return this one's variables; MPICH over TCP else sends one direction after the other."""
    return {"UCX_RNDV_SCHEME": "get_zcopy", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def _ranks(ranks: int) -> list[str]:
    return ["--ranks", str(ranks)] if ranks > 1 else []


def _lfm2kit(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "lfm2kit", *command]


def cases(asked: argparse.Namespace) -> Iterator[Case]:
    for ranks in map(int, asked.ranks.split(",")):
        for link in asked.links.split(",") if ranks > 1 else [HERE]:
            for layout in asked.layouts.split(",") if ranks > 1 else ["one"]:
                for n in map(int, asked.n.split(",")):
                    case = Case(ranks, link, layout, n)
                    if asked.only is None or {*asked.only.split(",")} <= {*map(str, case)}:
                        yield case


def row(case: Case, predicted: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return a row of the table."""
    seconds = [values(run, "time")[0] for run in runs]
    median = statistics.median(seconds)
    parts = [of_run for run in runs if (of_run := parts_of(run)) is not None]
    compute, exchange, waiting = (statistics.median(of) for of in zip(*parts, strict=True))
    mine = predicted["parts"]
    ours = (mine["compute"] + mine["copies"], mine["exchange"] + mine["gather"], mine["waiting"])
    both = zip(ours, (compute, exchange, waiting), strict=True)
    sent = [sum(run.get("exchanged", {}).get("bytes", [])) for run in runs]
    cells = [
        *map(str, case),
        f"{predicted['seconds']:.3g}",
        f"{median:.3g} ({min(seconds):.3g} to {max(seconds):.3g})",
        f"{predicted['seconds'] / median:.2f}",
        *(f"{a:.3g} / {b:.3g}" for a, b in both),
        f"{sum(predicted['sent_bytes']) / 1e6:.3g} / {statistics.median(sent) / 1e6:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def compare_times(asked: argparse.Namespace) -> None:
    bench = Bench(asked)
    headings = ("ranks", "link", "layout", "n", "predicted s", "measured s", "ratio")
    parts = ("computing, predicted / measured", "exchange and gather", "waiting", "MB sent")
    lines = [f"| {' | '.join((*headings, *parts))} |", "|---" * 11 + "|"]
    for case in cases(asked):
        lines.append(row(case, bench.predicted(case), bench.measured(case)))
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))


def compare_bytes(asked: argparse.Namespace) -> bool:
    """Return whether real ranks have sent what follows from the routing, in each number of them.

    Between devices, messages and their headers are the exchange's own, and only rows are compared.
    """
    tiny, n = open_checkpoint(EMBEDDED / "tiny", []), 21
    recorder = RoutingRecorder()
    model = set_up(tiny, Options(backend="cpu_simd"), rewrites=[recorder.rewrite()]).build()
    ids = samples.read_inputs(EMBEDDED / "tiny" / "inputs.bin")[:n]
    run_samples(model, ids, n)
    routing, are_equal = recorder.routing(ids.shape[1]), True
    names = ("rows", "bytes of rows") if asked.exchange == "device" else ("messages", "bytes")
    for ranks in map(int, asked.bytes.split(",")):
        how = f"--threads 1 --overlap off --parallel ep --exchange {asked.exchange} --ranks {ranks}"
        run = ["run", "-n", str(n), "--backend", asked.backend, *how.split(), "--json", "-"]
        done = subprocess.run(_lfm2kit(run), stdout=subprocess.PIPE, check=True)
        exchanged = json.loads(done.stdout)["exchanged"]
        job = Job.of(tiny.spec, Layout([0] * ranks, Grouping((tuple(range(ranks)),)), n), n)
        for name in names:
            real = _sent(exchanged, name)
            counts = [[_of(leg, name) for leg in _legs(of)] for of in job.counts(routing)]
            gathered = job.gathered(tiny.spec.lm_head.vocab_size)
            mine = [sum(c) + _of(g, name) for c, g in zip(counts, gathered, strict=True)]
            verdict = "equal" if real == mine else f"DIFFERENT: {mine}"
            are_equal = are_equal and real == mine
            print(f"{ranks} ranks, {name} by rank: {real}: {verdict}")
    return are_equal


def _sent(exchanged: dict[str, Any], name: str) -> list[int]:
    """Return what a run says that each rank has sent, logits included."""
    legs = [layer[operation] for layer in exchanged["layers"] for operation in OPERATIONS]
    legs.append(exchanged["gather"])
    return [
        sum(_of(Sent(**{key: leg[key][rank] for key in leg}), name) for leg in legs)
        for rank in range(len(exchanged["bytes"]))
    ]


def _of(sent: Sent, name: str) -> int:
    """Return a count; numbers of rows that will come are headers, and no rows themselves."""
    bytes_of_rows = sent.bytes - sent.header_bytes
    return {
        "messages": sent.messages,
        "bytes": sent.bytes,
        "rows": sent.rows if bytes_of_rows else 0,
        "bytes of rows": bytes_of_rows,
    }[name]


def _legs(layers: Any) -> Iterator[Sent]:
    for counts in layers.values():
        yield from (counts.counts, counts.dispatch, counts.combine)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bytes", help="compare bytes of these numbers of ranks, such as 2,4,8,16")
    parser.add_argument("--model", help="a checkpoint with MoE layers")
    parser.add_argument("--out", help="a folder for what is calibrated and run")
    parser.add_argument("--backend", default="cpu_simd")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--exchange", default="host", help="of --bytes: host or device")
    parser.add_argument("--threads", type=int, default=1, help="of a rank; 0: all")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--links", default="none,1gbit,200mbit")
    parser.add_argument("--layouts", default="ep")
    parser.add_argument("-n", default="16,64")
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="runs of each case")
    parser.add_argument("--alone", action="store_true", help="calibrate one rank, and name links")
    parser.add_argument("--only", help="cases that have all of these, such as 2,200mbit")
    asked = parser.parse_args()
    if asked.bytes is not None:
        sys.exit(not compare_bytes(asked))
    if asked.model is None or asked.out is None:
        parser.error("give --model and --out, or --bytes")
    compare_times(asked)


if __name__ == "__main__":
    main()
