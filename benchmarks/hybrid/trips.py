"""What a trip from the midst of a GPU's work to a thread of the host and back takes, by four ways.

    python benchmarks/hybrid/trips.py --json trips.json

A trip sends scores [tokens, 32] and brings ids and weights [tokens, 4] back, which a thread without
Python's lock answers at once: nothing is chosen.  22 trips follow one another.  The ways:

a  Stream memory operations: a node of the graph writes a word that the thread waits for, and waits
   for the thread's.  What a node waits for is a constant, so it is the trip's place in the graph:
   neighbours differ, also the last and the first, so nothing has to be reset.  Copies are nodes
   (`a copies`), or kernels that read or write the host's memory (`a`).
b  The backend's channel: kernels write the word, and wait for the thread's.  With 1 and 4 threads.
c  A host node, which the driver calls: a C callback, between the kernels of (a).
d  The graph is cut at each trip.  Python launches a piece, waits for its event, calls the thread's
   function and launches the next.

`copies` are the kernels of (a) without a trip.  Prints a Markdown table: microseconds a trip, the
median of all replays and their 99th percentile, on the GPU's clock.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import cupy
import cupyx
import numba
import numpy as np
from cupy.cuda.function import Module
from lfm2kit_cuda import nvrtc
from lfm2kit_cuda.capture import recorded
from lfm2kit_cuda.compiling import architecture_name
from lfm2kit_cuda.device import compute_capability, name, on_device
from lfm2kit_cuda.kernels import Kernel
from lfm2kit_cuda.memory import memory_of
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lfm2kit.crossing import ArrayForm

EXPERTS, TAKEN, TRIPS = 32, 4, 22
WARM_UP, SOON, HUNG = 20, 10.0, 5.0  # replays; seconds until a wait ends, and until it is ended
LINE = 16  # words
WAIT_32, WRITE_32, WAIT_EQUAL = 1, 2, 1  # CU_STREAM_MEM_OP_*, CU_STREAM_WAIT_VALUE_EQ
SET_DEPENDENCIES = 1  # CU_STREAM_SET_CAPTURE_DEPENDENCIES
COPY = """
extern "C" __global__ void copy(const uint4* from, uint4* to, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    to[i] = from[i];
}
"""

# The thread of the host.


def _load_acquire(context: Any, words: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = cgutils.create_struct_proxy(words)(context, builder, arguments[0])
        at = builder.gep(array.data, [arguments[1]])
        return builder.load_atomic(at, "acquire", 4)

    return types.uint32(words, types.intp), generate


def _store_release(context: Any, words: Any, i: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = cgutils.create_struct_proxy(words)(context, builder, arguments[0])
        at = builder.gep(array.data, [arguments[1]])
        builder.store_atomic(arguments[2], at, "release", 4)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.uint32), generate


load_acquire, store_release = intrinsic(_load_acquire), intrinsic(_store_release)


def _serve(sent: Any, answered: Any, worker: int, seen: Any, stopped: Any, ids: Any) -> None:
    """Answer each number that appears in sent[0] after `seen`, until stopped[0] is set."""
    while True:
        trip = load_acquire(sent, 0)
        if trip == seen:
            if stopped[0]:
                return
            continue
        seen = trip
        if worker == 0:
            ids[0] = trip
        store_release(answered, worker * LINE, trip)


def _answer(ids: Any) -> None:
    ids[0] += 1


def _call_back(address: Any) -> None:
    numba.carray(address, (1,))[0] += 1


serve = numba.njit(nogil=True)(_serve)
answer = numba.njit("void(int32[::1])", nogil=True)(_answer)
call_back = numba.cfunc(types.void(types.CPointer(types.int32)))(_call_back)


@contextmanager
def serving(sent: Any, answered: Any, ids: Any, workers: int) -> Iterator[None]:
    """Run threads that answer, each bound to a core of its own if there are enough."""
    stopped, seen = np.zeros(1, np.int32), np.uint32(sent[0])
    cores = sorted(os.sched_getaffinity(0))
    own = cores[-workers:] if len(cores) > 2 * workers else []

    def run(worker: int) -> None:
        if own:
            os.sched_setaffinity(0, {own[worker]})  # of this thread alone
        serve(sent, answered, worker, seen, stopped, ids)

    serve(sent, answered, 0, seen, np.ones(1, np.int32), ids)  # compiled
    threads = [threading.Thread(target=run, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped[0] = 1
        for thread in threads:
            thread.join()


# What is captured.


class Pinned:
    """An array of the host that kernels and copies can use, too: it is at the same address."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.array = cupyx.empty_pinned(shape, dtype)
        self.array[...] = 0
        self.data = self
        self.ptr = self.array.ctypes.data
        self.nbytes = self.array.nbytes


@cache
def copy_kernel() -> Kernel:
    module = Module()
    options = (f"--gpu-architecture={architecture_name(*compute_capability())}",)
    module.load(nvrtc.compile_cubin(COPY, "copy.cu", options))
    return Kernel(module.get_function("copy"))


def copy_by_kernel(source: Any, target: Any) -> None:
    count = source.nbytes // 16
    copy_kernel()((min(max(count // 256, 1), 32),), 256, source, target, count)


def copy_by_node(source: Any, target: Any) -> None:
    """Add a copy of the copy engines to the current stream."""
    kind = cupy.cuda.runtime.memcpyDefault
    stream = cupy.cuda.get_current_stream().ptr
    cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, kind, stream)


class Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams, of 32 bits."""

    _fields_ = (
        ("operation", ctypes.c_uint),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("alias", ctypes.c_uint64),
        ("padding", ctypes.c_uint64),
    )


class Operations(ctypes.Structure):
    """CUDA_BATCH_MEM_OP_NODE_PARAMS."""

    _fields_ = (
        ("context", ctypes.c_void_p),
        ("count", ctypes.c_uint),
        ("operations", ctypes.POINTER(Operation)),
        ("flags", ctypes.c_uint),
    )


@cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: the driver's error {status}")


def add_operations(*operations: Operation) -> None:
    """Add a node to the graph that the current stream captures, and let the stream go on there."""
    stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
    state, graph, before = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    number, count = ctypes.c_uint64(), ctypes.c_size_t()
    check(
        driver().cuStreamGetCaptureInfo_v2(
            stream, ctypes.byref(state), ctypes.byref(number), ctypes.byref(graph),
            ctypes.byref(before), ctypes.byref(count),
        ),
        "cuStreamGetCaptureInfo",
    )  # fmt: skip
    context, node = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    array = (Operation * len(operations))(*operations)
    parameters = Operations(context, len(operations), array, 0)
    check(
        driver().cuGraphAddBatchMemOpNode(
            ctypes.byref(node), graph, before, count, ctypes.byref(parameters)
        ),
        "cuGraphAddBatchMemOpNode",
    )
    check(
        driver().cuStreamUpdateCaptureDependencies(
            stream, ctypes.byref(node), ctypes.c_size_t(1), SET_DEPENDENCIES
        ),
        "cuStreamUpdateCaptureDependencies",
    )


def add_host_node(address: int) -> None:
    stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
    function, argument = ctypes.c_void_p(call_back.address), ctypes.c_void_p(address)
    check(driver().cuLaunchHostFunc(stream, function, argument), "cuLaunchHostFunc")


def graph_of(step: Callable[[], None]) -> cupy.cuda.Graph:
    graph, _ = recorded(lambda batch: step(), cast(Any, None))
    return graph


# The ways.


class Arrays:
    """What a trip takes and brings; ids and weights are one array on either side."""

    def __init__(self, tokens: int) -> None:
        rng = np.random.default_rng(tokens)
        self.scores = cupy.asarray(rng.random((tokens, EXPERTS), np.float32))
        self.chosen = cupy.zeros((2, tokens, TAKEN), np.int32)
        self.host_scores = Pinned((tokens, EXPERTS), np.float32)
        self.host_chosen = Pinned((2, tokens, TAKEN), np.int32)
        self.host_ids = self.host_chosen.array.reshape(-1)

    def last_id(self) -> int:
        return int(self.chosen[0, 0, 0])


class Way(NamedTuple):
    launch: Callable[[], object]  # enqueues the trips in the current stream
    trip: Callable[[], int]  # the number that the last trip has brought
    step: int  # by which it grows with each replay
    release: Callable[[], None]  # ends a wait that has no deadline


def nothing() -> None:
    pass


def launch(graph: cupy.cuda.Graph) -> None:
    graph.launch(cupy.cuda.get_current_stream())


@contextmanager
def copies(tokens: int) -> Iterator[Way]:
    arrays = Arrays(tokens)

    def step() -> None:
        for _ in range(TRIPS):
            copy_by_kernel(arrays.scores, arrays.host_scores)
            copy_by_kernel(arrays.host_chosen, arrays.chosen)

    graph = graph_of(step)
    yield Way(lambda: launch(graph), arrays.last_id, 0, nothing)


@contextmanager
def memory_operations(tokens: int, copy: Callable[[Any, Any], None]) -> Iterator[Way]:
    arrays, sent, answered = Arrays(tokens), *(Pinned((LINE,), np.uint32) for _ in range(2))

    def step() -> None:
        for place in range(1, TRIPS + 1):
            copy(arrays.scores, arrays.host_scores)
            add_operations(
                Operation(WRITE_32, sent.ptr, place, 0),
                Operation(WAIT_32, answered.ptr, place, WAIT_EQUAL),
            )
            copy(arrays.host_chosen, arrays.chosen)

    def release() -> None:
        for place in range(1, TRIPS + 1):
            answered.array[0] = place
            time.sleep(1e-4)

    graph = graph_of(step)
    with serving(sent.array, answered.array, arrays.host_ids, 1):
        yield Way(lambda: launch(graph), arrays.last_id, 0, release)


@contextmanager
def channel(tokens: int, workers: int) -> Iterator[Way]:
    arrays, there = Arrays(tokens), memory_of(cupy.cuda.runtime.getDevice())
    way = there.channel(workers, SOON)
    back = [ArrayForm((tokens, TAKEN), np.dtype(t)) for t in (np.int32, np.float32)]
    call = way.call([ArrayForm(arrays.scores.shape, arrays.scores.dtype)], back, workers)
    pool = cupy.cuda.MemoryPool()
    results: list[Any] = []

    def step() -> None:
        for _ in range(TRIPS):
            call.send(arrays.scores)
            results[:] = call.receive()

    def last_id() -> int:
        if way.failed.any():
            raise RuntimeError(f"a trip was not answered within {SOON:.0f} s")
        return int(results[0][0, 0])

    with cupy.cuda.using_allocator(pool.malloc):
        graph = graph_of(step)
    with serving(way.sent, way.answered.reshape(-1), call.results[0].reshape(-1), workers):
        yield Way(lambda: launch(graph), last_id, TRIPS, nothing)


@contextmanager
def host_nodes(tokens: int) -> Iterator[Way]:
    arrays = Arrays(tokens)

    def step() -> None:
        for _ in range(TRIPS):
            copy_by_kernel(arrays.scores, arrays.host_scores)
            add_host_node(arrays.host_chosen.ptr)
            copy_by_kernel(arrays.host_chosen, arrays.chosen)

    graph = graph_of(step)
    yield Way(lambda: launch(graph), arrays.last_id, TRIPS, nothing)


@contextmanager
def pieces(tokens: int) -> Iterator[Way]:
    arrays, sent = Arrays(tokens), cupy.cuda.Event(disable_timing=True)

    def piece(place: int) -> None:
        if place > 0:
            copy_by_kernel(arrays.host_chosen, arrays.chosen)
        if place < TRIPS:
            copy_by_kernel(arrays.scores, arrays.host_scores)

    graphs = [graph_of(partial(piece, place)) for place in range(TRIPS + 1)]

    def launch_all() -> None:
        stream, (*before, last) = cupy.cuda.get_current_stream(), graphs
        for graph in before:
            graph.launch(stream)
            sent.record(stream)
            sent.synchronize()
            answer(arrays.host_ids)
        last.launch(stream)

    yield Way(launch_all, arrays.last_id, TRIPS, nothing)


WAYS: dict[str, Callable[[int], Any]] = {
    "a": lambda tokens: memory_operations(tokens, copy_by_kernel),
    "a copies": lambda tokens: memory_operations(tokens, copy_by_node),
    "b": lambda tokens: channel(tokens, 1),
    "b 4 threads": lambda tokens: channel(tokens, 4),
    "c": host_nodes,
    "d": pieces,
    "copies": copies,
}


# The measurement.


def waited_for(event: cupy.cuda.Event, release: Callable[[], None]) -> None:
    """Wait for an event; raises RuntimeError if only `release` has ended the wait."""
    until = time.perf_counter() + 2 * SOON
    late = time.perf_counter() + HUNG
    while not event.done:
        if release is not nothing and time.perf_counter() > late:
            while not event.done and time.perf_counter() < until:
                release()
            raise RuntimeError(f"no answer arrived within {HUNG:.0f} s")
        time.sleep(0)


def measured(way: Way, replays: int) -> list[float]:
    """Return the microseconds a trip of each replay.  Raises RuntimeError if a trip was wrong."""
    times = []
    for replay in range(WARM_UP + replays):
        before = way.trip() if replay % 50 == 0 else None
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        way.launch()
        end.record()
        if replay == 0:
            waited_for(end, way.release)
        end.synchronize()
        times.append(1e3 * cupy.cuda.get_elapsed_time(begin, end) / TRIPS)
        if replay > 0 and before is not None and way.trip() != before + way.step:
            raise RuntimeError(f"the last trip brought {way.trip()}, not {before + way.step}")
    return times[WARM_UP:]


class Row(NamedTuple):
    way: str
    tokens: int
    median: float | None = None  # us a trip
    p99: float | None = None
    least: float | None = None
    error: str | None = None


def row(way: str, tokens: int, replays: int) -> Row:
    try:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            with WAYS[way](tokens) as ready:
                times = measured(ready, replays)
            stream.synchronize()
    except Exception as error:  # the other ways can still be measured
        return Row(way, tokens, error=f"{type(error).__name__}: {error}")
    median, p99 = np.percentile(times, [50, 99])
    return Row(way, tokens, float(median), float(p99), min(times))


def text(rows: list[Row], way: str, tokens: int) -> str:
    (found,) = (r for r in rows if (r.way, r.tokens) == (way, tokens))
    return "failed" if found.median is None else f"{found.median:.1f} / {found.p99:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="16,256,512,1024,2048")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("-r", "--replays", type=int, default=300)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args()
    sizes, ways = [*map(int, options.tokens.split(","))], options.ways.split(",")
    start = time.perf_counter()
    with on_device(cupy.cuda.runtime.getDevice()):
        cupy.cuda.Stream.null.synchronize()
        rows = [row(way, tokens, options.replays) for way in ways for tokens in sizes]
    print(
        f"{name()}, driver {cupy.cuda.runtime.driverGetVersion()}, {os.cpu_count()} cores, "
        f"{options.replays} replays of {TRIPS} trips: us a trip, median / 99th percentile\n"
    )
    headings = ["way", *(f"{n} tokens" for n in sizes)]
    print("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
    for way in ways:
        print(f"| {way} | " + " | ".join(text(rows, way, n) for n in sizes) + " |")
    for failed in (r for r in rows if r.error):
        print(f"{failed.way}, {failed.tokens} tokens: {failed.error}", file=sys.stderr)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([r._asdict() for r in rows], indent=1))


if __name__ == "__main__":
    main()
