"""cpu_simd against its peers on this machine: who does how much a second, and what the limits are.

    benchmarks/cpu/compare.sh                            # everything: about half an hour
    benchmarks/cpu/compare.sh --dtype F32 --only n1,n16 -r 5

lfm2kit meets one rival at a time, and the two take turns: machines drift, and two models in FP32
are what 24 GB of memory hold.  Before anything is timed, both answer the same question, and the
largest difference is printed; in FP32 one above 1e-3 ends the run (but see `_difference`).  The
machine's ceilings are measured before every task, by the backend's own kernels; the best of a bout
count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from contenders import Contender, Process, running
from tables import Row, table
from tasks import GROUPS, Task, bouts, tasks

from lfm2kit import specs
from lfm2kit.backend import Ceilings
from lfm2kit.checkpoint import open_checkpoint

DTYPES = ("F32", "BF16", "F16")
DATA = Path(__file__).parents[1] / ".data"
MOST_DIFFERENCE = 1e-3  # of FP32 answers: beyond it somebody did other work
TIES = 32  # one sample of this number may meet equal scores of two experts


def main() -> None:
    options = _options()
    rows: list[Row] = []
    print(f"{_machine()}, {options.threads} threads; median of {options.repetitions} (spread)\n")
    for dtype in options.dtype:
        rows += _meetings(dtype, options)
        print(f"\n## {dtype}\n\n{table([r for r in rows if r.dtype == dtype])}\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    if not rows:
        raise SystemExit("nothing to do: --dtype, --only and --rival leave no test")


def _meetings(dtype: str, options: argparse.Namespace) -> Iterator[Row]:
    ours = Contender("lfm2kit", dtype)
    spec = open_checkpoint(ours.path(options.data)).spec
    for rival, groups in bouts(dtype):
        wanted = [group for group in groups if group in options.only]
        if wanted and options.rival in rival.name:
            yield from _bout(ours, rival, list(_tasks(wanted, spec, dtype)), options)


def _tasks(groups: Sequence[str], spec: specs.Model, dtype: str) -> Iterator[Task]:
    for group in groups:
        yield from tasks(group, spec, dtype)


def _bout(
    ours: Contender, rival: Contender, todo: list[Task], options: argparse.Namespace
) -> list[Row]:
    """Run all tasks between two contenders; the ceilings are the best that were seen meanwhile."""
    _remark(f"{ours.name} and {rival.name}: loading")
    with running([ours, rival], options.data, options.threads) as processes:
        rows = []
        for task in todo:
            ceilings = Ceilings(*processes[0].ask("ceilings", wanted=True).result)
            difference = _difference(processes, task)
            seconds = _turns(processes, task, options.repetitions, options.pause)
            row = Row.of(task, ours, rival, seconds, difference, ceilings)
            _remark(
                f"  {task.name}: {row.ratio:.2f} times {rival.name}, differs by {difference:.1e}"
            )
            rows.append(row)
    flops, read = (max(getattr(row, peak) for row in rows) for peak in ("peak_flops", "peak_bytes"))
    return [dataclasses.replace(row, peak_flops=flops, peak_bytes=read) for row in rows]


def _difference(processes: list[Process], task: Task) -> float:
    """Return the largest difference of the two answers, which also warms both up.

    Where two experts score equal to the last bits, FP32 alone does not say which is taken: one row
    of logits in 32 may differ for that, and does not count.
    """
    answers = [p.ask(task.method, *task.arguments, wanted=True).result for p in processes]
    each = np.sort(np.max(np.abs(answers[0] - answers[1]), axis=1))
    is_exact = all(process.name.endswith("F32") for process in processes)
    allowed = len(each) // TIES if is_exact and task.method == "forward" else 0
    tied = min(allowed, int(np.count_nonzero(each > MOST_DIFFERENCE)))
    difference = float(each[len(each) - tied - 1])
    if not np.isfinite(difference) or (is_exact and difference > MOST_DIFFERENCE):
        names = " and ".join(process.name for process in processes)
        raise SystemExit(f"{task.name}: {names} differ by {difference:.2e}: not the same work")
    return difference


def _turns(
    processes: list[Process], task: Task, repetitions: int, pause: float
) -> list[list[float]]:
    """Return each one's seconds, measured alternately; spinning threads sleep in the pauses."""
    seconds: list[list[float]] = [[] for _ in processes]
    for _ in range(repetitions):
        for process, taken in zip(processes, seconds, strict=True):
            time.sleep(pause)
            taken.append(process.ask(task.method, *task.arguments).seconds)
    return seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dtype", type=_choice(DTYPES), default=DTYPES, help="types of weights, by commas")
    add("--only", type=_choice(GROUPS), default=GROUPS, help=f"of {','.join(GROUPS)}")
    add("--rival", default="", help="only rivals whose names contain this")
    add("-r", "--repetitions", type=int, default=7)
    add("--pause", type=float, default=0.3, help="seconds between turns")
    add("--threads", type=int, default=_cores())
    add("--data", type=Path, default=Path(os.environ.get("LFM2KIT_BENCH_DATA", DATA)))
    add("--json", type=Path, help="a file for every second that was measured")
    return parser.parse_args()


def _choice(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there is {', '.join(known)}")
        return chosen

    return parse


def _cores() -> int:
    """Return the physical cores that this process may use; a core's second thread adds nothing."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, psutil.cpu_count(logical=False) or 1)


def _machine() -> str:
    import llvmlite.binding

    gigabytes = psutil.virtual_memory().total / 2**30
    cpu = llvmlite.binding.get_host_cpu_name()
    return f"{platform.machine()} ({cpu}), {gigabytes:.0f} GiB"


def _remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
