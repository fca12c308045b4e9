"""Records when each block starts and how long it takes: a timeline for https://ui.perfetto.dev.

LFM2KIT_TRACE=trace.json lfm2kit run -v
lfm2kit trace-summary trace.json
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lfm2kit
from lfm2kit.backend import Block, Mark, Memory, Ordered
from lfm2kit.specs import Spec
from lfm2kit.text import printable

VARIABLE = "LFM2KIT_TRACE"
MOST_PENDING = 20_000  # calls whose marks are kept: a mark may hold an event of its device


@lfm2kit.hookimpl
def lfm2kit_block_wrapper(name: str, spec: Spec, memory: Memory) -> lfm2kit.Wrapper | None:
    """Return a wrapper that records a block's calls; None if no trace is asked for.

    It does not survive capture: a replay calls no block that could be timed.
    """
    target = os.environ.get(VARIABLE)
    return _trace(target).wrapper(name or "model", spec.kind, memory) if target else None


@lfm2kit.hookimpl
def lfm2kit_run_ended(record: Mapping[str, Any]) -> None:
    """Put what was run into the trace, so that the file says what its times are of."""
    target = os.environ.get(VARIABLE)
    if target:
        _trace(target).record = record


@lfm2kit.hookimpl
def lfm2kit_commands() -> Iterator[lfm2kit.Command]:
    yield lfm2kit.Command("trace-summary", trace_summary)


class HostMark(NamedTuple):
    """A moment on the host's clock; an ordered memory has marks of its own, on its device's."""

    seconds: float

    def seconds_since(self, earlier: Any) -> float:
        return float(self.seconds - earlier.seconds)


def host_mark() -> HostMark:
    return HostMark(time.perf_counter())


class Call(NamedTuple):
    """A call that has been made, and perhaps not ended on its device."""

    event: Mapping[str, Any]
    start: Mark
    end: Mark
    origin: Origin


class Origin(NamedTuple):
    """A mark of a memory, and the host's time when it was made."""

    mark: Mark
    seconds: float


class Trace:
    """The calls of every block, as events of the Chrome trace format, written when we exit."""

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise lfm2kit.Lfm2kitError(
                f"{VARIABLE}={path}: no file can be written there; name one in a folder of yours"
            )
        self.path = path
        self.record: Mapping[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self._pending: list[Call] = []
        self._origins: dict[str, Origin] = {}  # by memory
        self._threads: dict[str, int] = {}  # a line of the timeline for each memory

    def wrapper(self, name: str, kind: str, memory: Memory) -> lfm2kit.Wrapper:
        mark = memory.mark if isinstance(memory, Ordered) else host_mark

        def wrap(block: Block) -> Block:
            event = {"name": name, "cat": kind, "ph": "X", "pid": os.getpid()}
            event["tid"] = self._thread(memory.name)

            def traced(*inputs: Any) -> Any:
                origin = self._origins.get(memory.name) or self._begin(memory.name, mark)
                start = mark()
                result = block(*inputs)
                self._pending.append(Call(event, start, mark(), origin))
                if len(self._pending) > MOST_PENDING:
                    self._settle()
                return result

            return traced

        return lfm2kit.Wrapper(wrap)

    def write(self) -> None:
        """Write the whole new file or keep the old one; then print the totals on stderr."""
        self._settle()
        names = [_thread_name(memory, tid) for memory, tid in self._threads.items()]
        document = {"traceEvents": [*names, *self.events], "otherData": dict(self.record)}
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(document))
            partial.replace(self.path)
        except OSError as error:
            sentence = f"lfm2kit-trace: {self.path} not written: {error.strerror}"
            print(printable(sentence), file=sys.stderr)
        for line in _totals(self.events, "cat"):
            print(line, file=sys.stderr)

    def _thread(self, memory: str) -> int:
        if not self._threads:
            atexit.register(self.write)  # not before: a command may build no model
        return self._threads.setdefault(memory, len(self._threads) + 1)

    def _begin(self, memory: str, mark: Callable[[], Mark]) -> Origin:
        return self._origins.setdefault(memory, Origin(mark(), time.perf_counter()))

    def _settle(self) -> None:
        """Turn marks into times; all calls have ended, or are waited for."""
        for event, start, end, origin in self._pending:
            ts = 1e6 * (origin.seconds + start.seconds_since(origin.mark))
            self.events.append({**event, "ts": ts, "dur": 1e6 * end.seconds_since(start)})
        self._pending.clear()


def _thread_name(memory: str, tid: int) -> dict[str, Any]:
    event = {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": tid}
    return {**event, "args": {"name": f"memory {memory}"}}


def trace_summary(file: Path, blocks: bool = False) -> None:
    """Print the calls, seconds and share of each kind of block in a trace, or of each block."""
    events, shown = _read(file)
    for key, value in shown.items():
        print(printable(f"{key + ':':19} {value}"))
    for line in _totals(events, "name" if blocks else "cat"):
        print(printable(line))


def _read(file: Path) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Return the calls in a trace's file, and what its summary says of the run."""
    try:
        document = json.loads(file.read_text())
        events = [event for event in document["traceEvents"] if event["ph"] == "X"]
        _totals(events, "cat")
        return events, dict(_shown(document.get("otherData", {})))
    except OSError as error:
        raise lfm2kit.Lfm2kitError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise lfm2kit.Lfm2kitError(f"{file}: not a trace that {VARIABLE} wrote") from None


def _shown(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("model", "backend", "precision", "ranks"):
        if key in record:
            yield key, record[key]
    for figure in record.get("figures", []):
        if figure["name"] == "throughput":
            yield figure["unit"], *figure["values"]


def _totals(events: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    """Return a line for each kind or block, the longest first; `model` is the whole of them."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for event in events:
        seconds[event[key]].append(event["dur"] / 1e6)
    whole, width = sum(seconds.get("model", [])), max(map(len, seconds), default=0)
    lines = []
    for name, times in sorted(seconds.items(), key=lambda item: -sum(item[1])):
        line = f"{name:{width}} {len(times):6} calls {sum(times):10.4f} s"
        lines.append(line + (f" {sum(times) / whole:6.1%}" if whole else ""))
    return lines


@cache
def _trace(target: str) -> Trace:
    """Return the trace that goes to `target`: one for all models that this process builds."""
    return Trace(Path(target.replace("%p", str(os.getpid()))))
