"""What is asked of the conformance suite, as it was typed."""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit.backend import Context
from lfm2kit.errors import Option
from lfm2kit.precisions import FP32


class Asked(NamedTuple):
    """The options of `lfm2kit backends check` that say what is judged."""

    only: str | None = None
    seed: int = 0
    examples: int | None = None
    model: str | None = None

    def again(self, context: Context) -> list[Option]:
        """Return the options with which a check draws the same inputs for the same backend."""
        given = {"precision": context.precision, "threads": context.threads, **self._asdict()}
        usual = {"precision": FP32.name, "threads": None, **Asked(self.only)._asdict()}
        return [Option(n, value) for n, value in given.items() if value != usual[n]]
