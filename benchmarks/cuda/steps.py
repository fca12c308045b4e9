"""Where a step of full-size LFM2-8B-A1B goes: by kernel, the GPU's idle time, Python's share.

    python benchmarks/cuda/steps.py --precision bf16 -n 16,128

A step is token ids in to logits out on the host.  Its kernels are those of the replayed graph, as
torch's profiler sees them (through CUPTI, whoever launches).  Two may overlap: one that is launched
early waits for the other, so that a kernel's own time begins where the one before has ended.
Python's share is a step without its graph and the copy of its logits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import cupy
import torch
from full_size import build
from torch.profiler import ProfilerActivity, profile

from lfm2kit.backend import BF16
from lfm2kit.building.plan import Plan
from lfm2kit.measuring.bench import random_batch

REPETITIONS = 20


class Interval(NamedTuple):
    name: str
    start: float  # us
    end: float


def kernels_of(call: Callable[[], object]) -> list[Interval]:
    """Return what the device did in a call, in the order in which it began."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    intervals = [Interval(e.name, e.time_range.start, e.time_range.end) for e in events]
    kernels = (i for i in intervals if not i.name.startswith(("Memcpy", "Memset")))
    return sorted(kernels, key=lambda interval: interval.start)


def own_times(intervals: Iterable[Interval]) -> list[tuple[str, float]]:
    """Return by how much each one prolonged the time in which something ran."""
    own, until = [], 0.0
    for name, start, end in intervals:
        own.append((name, max(end - max(start, until), 0.0)))
        until = max(until, end)
    return own


def median_seconds(call: Callable[[], object]) -> float:
    times = []
    for repetition in range(REPETITIONS + 3):
        start = time.perf_counter()
        call()
        if repetition >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_seconds(call: Callable[[], object], stream: cupy.cuda.Stream) -> float:
    times: list[float] = []
    for _ in range(REPETITIONS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return statistics.median(times)


def print_kernels(own: list[tuple[str, float]]) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    for name, time_of_one in own:
        times[name].append(time_of_one)
    print("\n| kernel | launches | us each, median | us in all |\n|---|---|---|---|")
    for name, taken in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"| {name} | {len(taken)} | {statistics.median(taken):.1f} | {sum(taken):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("-n", default="16,128")
    options = parser.parse_args()
    model = build(Plan.parse("cuda"), options.precision, BF16)
    for n in map(int, options.n.split(",")):
        batch = random_batch(n, 16, model.spec.embed_tokens.vocab_size, seed=n)
        step = median_seconds(lambda: model.logits(batch))  # noqa: B023
        replay = model.backend.capture(model.forward, batch)  # type: ignore[attr-defined]
        replay(batch)  # leaves the batch where the graph reads it
        graph, stream = replay._graph, cupy.cuda.Stream(non_blocking=True)
        model.home.to_host(replay._logits)
        in_graph = device_seconds(lambda: graph.launch(stream), stream)  # noqa: B023
        copying = median_seconds(lambda: model.home.to_host(replay._logits))  # noqa: B023
        intervals = kernels_of(lambda: graph.launch(stream))  # noqa: B023
        own, lasted = own_times(intervals), intervals[-1].end - intervals[0].start
        working = sum(time_of_one for _, time_of_one in own)
        print(
            f"\n{options.precision}, n={n}: {n / step:.0f} samples/s; step {1e6 * step:.0f} us: "
            f"graph {1e6 * in_graph:.0f}, copy {1e6 * copying:.0f}, "
            f"Python {1e6 * (step - in_graph - copying):.0f}\n"
            f"profiled: busy {working:.0f} of {lasted:.0f} us, idle "
            f"{100 * (1 - working / lasted):.1f} %"
        )
        print_kernels(own)
        replay.close()


if __name__ == "__main__":
    main()
