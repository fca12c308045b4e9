"""How fast text comes: tokens a second, the time to the first token, and memory."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from lfm2kit.cli.performing import peak_memory


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

    def fields(self) -> dict[str, Any]:
        """Return the figures as a record has them; seconds begin when the prompt is given."""
        return {
            "tokens": self.tokens,
            "seconds": self._last,
            "first_token_seconds": self._first,
            "tokens_per_second": self.tokens / self._last if self._last else None,
            "peak_memory_bytes": peak_memory(),
        }

    def line(self) -> str:
        """Return the figures in words."""
        said = f"{self.tokens} tokens"
        if self._last and self._first is not None:
            rate = self.tokens / self._last
            said += f", {rate:.4g} tokens/s, the first after {self._first:.3g} s"
        return f"{said}; peak memory {peak_memory() / 1e9:.3g} GB"
