"""What a check sees of the promise that it guards: strictly, or with a backend's reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lfm2kit.promises import Promise
from lfm2kit.testing.compare import Result, assert_close, assert_same
from lfm2kit.testing.verdicts import CheckFailed, NotPromised


@dataclass(slots=True)
class Guarding:
    """The comparisons of a check that guards a promise."""

    promise: Promise | None = None
    not_promised: Mapping[Promise, str] = field(default_factory=dict)  # by the backend
    cases: int = 0  # that were compared
    difference: str | None = None  # the first one in bits, of a promise that is taken back

    @property
    def reason(self) -> str | None:
        """Return why the backend takes the promise back, if it does."""
        return None if self.promise is None else self.promise.why_not(self.not_promised)

    def assert_same(
        self, got: Result, want: Result, what: str, within: float, **judged: Any
    ) -> None:
        """Raise `CheckFailed` unless two results have the bits that are promised.

        Where the promise is taken back, they may differ by a rounding: `within` and what is
        `judged` are arguments of `assert_close`.
        """
        assert self.promise is not None, "a check that compares promised bits names the promise"
        self.cases += 1
        try:
            assert_same(got, want, what)
        except CheckFailed as failure:
            if self.reason is None:
                raise
            self.difference = self.difference or str(failure)
            assert_close(got, want, within, what, **judged)

    def conclude(self) -> None:
        """Raise `NotPromised` if the promise is taken back, with what came of it."""
        if self.reason is None:
            return
        came = self.difference or f"the bits are the same in all {self.cases} cases"
        raise NotPromised(f"{self.reason}; {came}")
