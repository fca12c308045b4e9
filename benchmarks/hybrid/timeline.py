"""Where the time of one layer goes, on the GPU and on the CPU, while `hybrid` runs.

    python benchmarks/hybrid/timeline.py --precision bf16 -n 16 --svg docs/timeline.svg

The profiler of torch (CUPTI) stamps every kernel and copy of a captured forward; the machine code
of the choice stamps the beginning and the end of each worker's share on the same clock.  Prints how
long the GPU is idle in a layer with experts (no kernel but the one that waits), for `cuda`, for
`hybrid`, and for `hybrid` with a wait of the host at each choice instead of its crossings.
Writes a picture of one layer, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import types

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import itertools

from full_size import build
from lfm2kit_cpu_simd.blocks.router import Choice
from lfm2kit_hybrid.backend import HybridBackend
from lfm2kit_hybrid.instructions import call_native, load_long
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from lfm2kit.backend import BF16, NativeCall
from lfm2kit.building.plan import Plan
from lfm2kit.measuring.bench import random_batch
from lfm2kit.model import LFM2

MOST_WORKERS, MOST_STAMPS = 16, 4096
CLOCK_REALTIME = 0  # the profiler's clock
WAITING = "receive"
COLOURS = {"choice": "#c0504d", "waits": "#cccccc", "other": "#4f81bd", "copies": "#9bbb59"}


class Span(NamedTuple):
    name: str
    start: float  # microseconds
    end: float


# The CPU's side: a function that stamps and calls the choice.


@intrinsic
def nanoseconds(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, long = ir.IntType(32), ir.IntType(64)
        function = ir.FunctionType(word, [word, ir.PointerType(long)])
        clock = cgutils.get_or_insert_function(builder.module, function, "clock_gettime")
        pair = ir.ArrayType(long, 2)
        now = cgutils.alloca_once(builder, pair)
        builder.call(clock, [word(CLOCK_REALTIME), builder.bitcast(now, ir.PointerType(long))])
        both = builder.load(now)
        seconds = builder.mul(builder.extract_value(both, 0), long(10**9))
        return builder.add(seconds, builder.extract_value(both, 1))

    return types.int64(), codegen


@intrinsic
def store_long(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@numba.cfunc(types.void(*[types.int64] * 6))
def stamped(argument, inputs, results, rows, part, parts):  # type: ignore[no-untyped-def]
    """Call the function at argument[0] with argument[1]; argument[2] has a list for each part."""
    begin = nanoseconds()
    call_native(load_long(argument), load_long(argument + 8), inputs, results, rows, part, parts)
    stamps = load_long(argument + 16) + part * 8 * (2 * MOST_STAMPS + 2)
    count = load_long(stamps)
    if count < MOST_STAMPS:
        store_long(stamps + 16 * count + 16, begin)
        store_long(stamps + 16 * count + 24, nanoseconds())
        store_long(stamps, count + 1)


STAMPS = np.zeros((MOST_WORKERS, 2 * MOST_STAMPS + 2), np.int64)
native_of = Choice.native


def native(self: Choice) -> NativeCall:
    inner = native_of(self)
    argument = np.array([inner.function, inner.argument, STAMPS.ctypes.data], np.int64)
    return NativeCall(stamped.address, argument.ctypes.data, (inner, argument))


def choices() -> list[Span]:
    return [
        Span("choice", begin / 1e3, end / 1e3)
        for worker in STAMPS
        for begin, end in worker[2 : 2 + 2 * worker[0]].reshape(-1, 2)
    ]


# The GPU's side.


def profiled(model: LFM2, n: int, forwards: int) -> tuple[list[Span], list[Span]]:
    """Return the spans of the GPU and of the CPU in some captured forwards."""
    batch = random_batch(n, 16, model.spec.embed_tokens.vocab_size, seed=n)
    for _ in range(4):
        model.logits(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model.logits(batch)
        STAMPS[:, 0] = 0
        for _ in range(forwards):
            model.logits(batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    base = float(trace.get("baseTimeNanoseconds", 0)) / 1e3
    spans = [
        Span(str(e["name"]), e["ts"] + base, e["ts"] + base + e["dur"])
        for e in trace["traceEvents"]
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(spans, key=lambda span: span.start), choices()


def layers(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Yield the spans of each layer with experts: from its gate's product to the next layer's."""
    starts = [i for i, span in enumerate(spans) if span.name == "logits"]
    for a, b in itertools.pairwise(starts):
        if any(span.name.startswith("combine") for span in spans[a:b]):
            yield list(spans[a:b])


def idle_of(layer: Sequence[Span], end: float) -> float:
    """Return the microseconds until `end` in which no kernel works, though some may wait."""
    idle, busy_until, waits_until = 0.0, layer[0].start, 0.0
    for span in layer:
        if span.name == WAITING:
            waits_until = span.end
            continue
        # A kernel that was placed early also waits for the one that waits.
        start = max(span.start, waits_until) if span.end > waits_until else span.start
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, span.end)
    return idle + max(0.0, end - busy_until)


def row(what: str, spans: Sequence[Span]) -> str:
    found = list(layers(spans))
    pairs = list(itertools.pairwise(found))
    lengths = [b[0].start - a[0].start for a, b in pairs]
    # Layers of different operators, and the ends of forwards, are set aside by the median.
    idle = [idle_of(a, b[0].start) for a, b in pairs]
    median = statistics.median(lengths)
    return f"| {what} | {median:.1f} | {statistics.median(idle):.1f} | {len(pairs)} |"


# The picture.


def picture(gpu: Sequence[Span], cpu: Sequence[Span], title: str) -> str:
    """Return an SVG of the GPU's spans and the workers' shares."""
    begin, end = gpu[0].start, max(span.end for span in gpu)
    scale, height = 1100 / (end - begin), 22
    workers: list[list[Span]] = []
    for span in sorted(cpu, key=lambda span: span.start):
        free = next((worker for worker in workers if worker[-1].end <= span.start), None)
        if free is None:
            workers.append([span])
        else:
            free.append(span)
    rows = [("GPU", gpu), *((f"core {i}", spans) for i, spans in enumerate(workers))]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1220" height="{height * len(rows) + 70}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="10" y="16" font-size="13">{title}</text>',
    ]
    for i, (name, spans) in enumerate(rows):
        y = 28 + i * height
        out.append(f'<text x="10" y="{y + 13}">{name}</text>')
        for span in spans:
            x, width = 80 + (span.start - begin) * scale, (span.end - span.start) * scale
            colour = COLOURS[kind_of(span.name)]
            label = f"{span.name}: {span.end - span.start:.1f} us"
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="{height - 6}" '
                f'fill="{colour}" stroke="white" stroke-width="0.5"><title>{label}</title></rect>'
            )
            if width > 7 * len(span.name):
                out.append(f'<text x="{x + 3:.1f}" y="{y + 12}" fill="white">{span.name}</text>')
    y = 28 + len(rows) * height
    for i in range(11):
        at = (end - begin) * i / 10
        out.append(f'<text x="{80 + at * scale:.0f}" y="{y + 14}">{at:.0f} us</text>')
    return "\n".join([*out, "</svg>", ""])


def kind_of(name: str) -> str:
    if name == "choice":
        return name
    if name == WAITING:
        return "waits"
    return "copies" if name.startswith("Mem") or name == "send" else "other"


class WithoutCrossings(HybridBackend):
    def why_not_crossed(self, *arguments: Any) -> str:
        return "to see what waiting costs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("-r", "--forwards", type=int, default=10)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    Choice.native = native  # type: ignore[method-assign]
    print(f"{options.precision}, {options.n} samples of 16 tokens: microseconds of a layer\n")
    print("| | layer | GPU idle | layers |\n|---|---|---|---|")
    for what in ("cuda", "hybrid", "hybrid, waiting"):
        if "waiting" in what:
            import lfm2kit_hybrid.backend

            lfm2kit_hybrid.backend.HybridBackend = WithoutCrossings  # type: ignore[misc]
        model = build(Plan.parse(what.split(",")[0]), options.precision, BF16)
        gpu, cpu = profiled(model, options.n, options.forwards)
        print(row(what, gpu), flush=True)
        if what == "hybrid" and options.svg:
            layer = list(layers(gpu))[-5]
            inside = [s for s in cpu if layer[0].start <= s.start <= layer[-1].end]
            title = f"One layer of hybrid, {options.precision}, {options.n} samples of 16 tokens"
            options.svg.write_text(picture(layer, inside, title))
        del model


if __name__ == "__main__":
    main()
