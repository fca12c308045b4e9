"""The table of checks: each a function whose name is its id and whose docstring documents it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from lfm2kit.promises import Promise
from lfm2kit.testing.trial import Trial

Run = Callable[[Trial], None]


@dataclass(frozen=True, slots=True)
class Check:
    """A check: `run` returns if the backend passes, or raises `CheckFailed` or `Skipped`.

    It may guard a promise, by `Trial.assert_same`.
    """

    id: str
    run: Run
    promise: Promise | None = None

    @property
    def summary(self) -> str:
        """Return the first line of the documentation, which says what is guarded."""
        return self.documentation.splitlines()[0]

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.run) or ""


CHECKS: dict[str, Check] = {}


def check(function: Run) -> Run:
    """Enter a function into the table: `zero_rows` as "zero-rows"."""
    return _entered(function, None)


def guards(promise: Promise) -> Callable[[Run], Run]:
    """Return a decorator that enters a check of a promise."""
    return lambda function: _entered(function, promise)


def _entered(function: Run, promise: Promise | None) -> Run:
    name = function.__name__.strip("_").replace("_", "-")
    assert name not in CHECKS, f"two checks are called {name}"
    CHECKS[name] = Check(name, function, promise)
    return function
