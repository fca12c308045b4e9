"""The table of checks: each a function whose name is its id and whose docstring documents it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from lfm2kit.testing.trial import Trial


@dataclass(frozen=True, slots=True)
class Check:
    """A check: `run` returns if the backend passes, or raises `CheckFailed` or `Skipped`."""

    id: str
    run: Callable[[Trial], None]

    @property
    def summary(self) -> str:
        """Return the first line of the documentation, which says what is guarded."""
        return self.documentation.splitlines()[0]

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.run) or ""


CHECKS: dict[str, Check] = {}


def check(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
    """Enter a function into the table: `zero_rows` as "zero-rows"."""
    name = function.__name__.strip("_").replace("_", "-")
    assert name not in CHECKS, f"two checks are called {name}"
    CHECKS[name] = Check(name, function)
    return function
