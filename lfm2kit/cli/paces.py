"""How fast text comes: until a model is ready, to the first token, tokens a second, and memory."""

from __future__ import annotations

from time import perf_counter

from lfm2kit.building.byte_counts import size
from lfm2kit.cli.performing import peak_memory
from lfm2kit.cli.report import Report
from lfm2kit.kernel_cache import KernelCache
from lfm2kit.process.start import STARTED


class Readying:
    """A clock for the time until a model is ready, which starts when its blocks are to be built."""

    def __init__(self) -> None:
        self._start, self._kernels = perf_counter(), KernelCache.seconds
        self.seconds: dict[str, float] = {}  # by part, once it is ready

    def end(self) -> None:
        """Stop the clock: the model is ready.

        What was found and checked before counts as imports, which take most of that time.
        """
        kernels = KernelCache.seconds - self._kernels
        self.seconds = {
            "imports": self._start - STARTED,
            "kernels": kernels,
            "weights": perf_counter() - self._start - kernels,
        }

    def report(self, report: Report) -> None:
        """Add the times to a record."""
        for name, seconds in self.seconds.items():
            report.figure(f"ready: {name}", "s", [seconds], "lower")

    def line(self) -> str:
        """Return the times in words."""
        parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.seconds.items())
        return f"ready after {sum(self.seconds.values()):.3g} s ({parts})"


class Pace:
    """A count of tokens, and a clock."""

    def __init__(self) -> None:
        self.start()
        self._first: float | None = None
        self._last = 0.0
        self.tokens = 0

    def start(self) -> None:
        """Start the clock: the prompts are given now."""
        self._start = perf_counter()

    def note(self, tokens: int) -> None:
        """Note how many tokens there are now."""
        if tokens > self.tokens:
            self.tokens = tokens
            self._last = perf_counter() - self._start
            self._first = self._last if self._first is None else self._first

    def report(self, report: Report) -> None:
        """Add the figures to a record; its times begin when the prompts are given."""
        report.figure("time", "s", [self._last or None], "lower")
        report.figure("first token", "s", [self._first], "lower")
        rate = self.tokens / self._last if self._last else None
        report.figure("throughput", "tokens/s", [rate], "higher")
        report.figure("tokens", "tokens", [self.tokens])
        report.figure("peak memory", "B", [peak_memory()], "lower")

    def line(self) -> str:
        """Return the figures in words."""
        said = f"{self.tokens} tokens"
        if self._last and self._first is not None:
            rate = self.tokens / self._last
            said += f", {rate:.4g} tokens/s, the first after {self._first:.3g} s"
        return f"{said}; peak memory {size(peak_memory())}"
