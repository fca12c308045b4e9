"""Records when each block starts and how long it takes: a timeline for https://ui.perfetto.dev.

LFM2KIT_TRACE=trace.json lfm2kit run -v
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lfm2kit
from lfm2kit.backend import Block
from lfm2kit.specs import Spec
from lfm2kit.text import printable

VARIABLE = "LFM2KIT_TRACE"


@lfm2kit.hookimpl
def lfm2kit_block_wrapper(name: str, spec: Spec) -> Callable[[Block], Block] | None:
    """No wrapper, hence no cost, unless a trace is asked for."""
    target = os.environ.get(VARIABLE)
    return _trace(target).wrapper(name or "model", spec.kind) if target else None


class Trace:
    """The calls of every block, as events of the Chrome trace format, written when we exit."""

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise lfm2kit.Lfm2kitError(
                f"{VARIABLE}={path}: no file can be written there; name one in a folder of yours"
            )
        self.path = path
        self.events: list[dict[str, Any]] = []
        atexit.register(self.write)

    def wrapper(self, name: str, kind: str) -> Callable[[Block], Block]:
        event = {"name": name, "cat": kind, "ph": "X", "pid": os.getpid(), "tid": 1}

        def wrap(block: Block) -> Block:
            def traced(*inputs: Any) -> Any:
                start = time.perf_counter_ns()
                result = block(*inputs)
                microseconds = (time.perf_counter_ns() - start) / 1000
                self.events.append({**event, "ts": start / 1000, "dur": microseconds})
                return result

            return traced

        return wrap

    def write(self) -> None:
        """The old file or the whole new one, never half of it; then the totals on stderr."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps({"traceEvents": self.events}))
            partial.replace(self.path)
        except OSError as error:
            sentence = f"lfm2kit-trace: {self.path} not written: {error.strerror}"
            print(printable(sentence), file=sys.stderr)
        totals: dict[str, list[float]] = defaultdict(list)
        for event in self.events:
            totals[event["cat"]].append(event["dur"] / 1e6)
        for kind, seconds in sorted(totals.items(), key=lambda item: -sum(item[1])):
            print(f"{kind:8} {len(seconds):6} calls {sum(seconds):10.4f} s", file=sys.stderr)


@cache
def _trace(target: str) -> Trace:
    """The trace that goes to `target`: one for all models that this process builds."""
    return Trace(Path(target.replace("%p", str(os.getpid()))))
