"""Runs the checks on an installed backend, for `lfm2kit backends check` and for pytest."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lfm2kit.backend import Backend, Context
from lfm2kit.building.plugins import Plugins
from lfm2kit.precisions import FP32, Precision
from lfm2kit.promises import Promise
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing.call_log import CallLog
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.guarding import Guarding
from lfm2kit.testing.random_weights import seed_of
from lfm2kit.testing.scope import DEFAULT_SCOPE, OUT_OF_SCOPE, Scope
from lfm2kit.testing.selection import selected
from lfm2kit.testing.tracebacks import place_of
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, NotPromised, Skipped

TOO_LARGE = ("rows-among-100000", "ids-beyond-32767")  # for the widths of models
Verdict = Literal[
    "passed", "failed", "skipped", "not-promised", "expected-failure", "unexpected-pass"
]
NO_REASONS: Mapping[Promise, str] = {}


class Result(NamedTuple):
    """The verdict of one check on a backend."""

    id: str
    verdict: Verdict
    detail: str  # one line: the failure, why it was skipped, or what was checked
    seconds: float
    notes: tuple[str, ...] = ()  # of a failure: where in the backend's code, and in which call
    traceback: str = ""  # of a failure
    promise: str | None = None  # that the check guards
    cases: int = 0  # in which its bits were compared
    differs: bool = False  # whether they were others than a promise says that is taken back

    @property
    def is_failure(self) -> bool:
        """Return whether the backend as a whole fails by this: an unexpected pass counts."""
        return self.verdict in ("failed", "unexpected-pass")


def run_checks(
    backend_name: str,
    plugins: Plugins,
    context: Context,
    only: Iterable[str] | None = None,
    *,
    scope: Scope = DEFAULT_SCOPE,
    expected_failures: Mapping[str, str] | None = None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Return the result of every check (or of those in `only`) for an installed backend.

    `scope` says what they look at.  `expected_failures` maps check ids to reasons: such a
    check must fail.  `done` is called after each check.  Raise `Lfm2kitError` if the backend is not
    there, cannot run, or lacks the precision, and for an unknown id; what a check raises is its
    result.
    """
    ids = selected(only)
    expected = dict(expected_failures or {})
    selected(expected)
    backend = plugins.creator(context)(backend_name)
    precision = plugins.precision(backend_name, context.precision)
    taken_back = plugins.backend(backend_name).not_promised
    results = []
    for name in ids:
        why = expected.get(name)
        result = judged(name, backend, precision, why, scope, not_promised=taken_back)
        done(result)
        results.append(result)
    return results


def judged(
    name: str,
    backend: Backend,
    precision: Precision = FP32,
    expected: str | None = None,
    scope: Scope = DEFAULT_SCOPE,
    log: CallLog | None = None,
    not_promised: Mapping[Promise, str] = NO_REASONS,
) -> Result:
    """Return the result of one check; `expected` is why it is expected to fail.

    The backend takes back what is `not_promised`.  What blocks it builds and calls is noted in
    `log`.
    """
    start = time.perf_counter()
    guarding = Guarding(CHECKS[name].promise, not_promised)
    verdict: Verdict = "passed"
    detail, details = "", ""
    notes: tuple[str, ...] = ()
    try:
        run_check(name, backend, precision, scope, log, guarding)
    except Skipped as reason:
        verdict, detail = "skipped", str(reason)
    except NotPromised as reason:
        verdict, detail = "not-promised", str(reason)
    except Exception as error:  # whatever a backend raises is a verdict on it
        verdict, detail, notes = "failed", _said(error), tuple(error.__notes__)
        details = "".join(traceback.format_exception(error))
    if expected is not None and verdict == "failed":
        verdict, detail = "expected-failure", expected
    elif expected is not None and verdict == "passed":
        verdict, detail = "unexpected-pass", f"expected to fail: {expected}"
    seconds = time.perf_counter() - start
    promise = None if guarding.promise is None else guarding.promise.name
    seen = promise, guarding.cases, guarding.difference is not None
    return Result(name, verdict, detail, seconds, notes, details, *seen)


def run_check(
    name: str,
    backend: Backend,
    precision: Precision = FP32,
    scope: Scope = DEFAULT_SCOPE,
    log: CallLog | None = None,
    guarding: Guarding | None = None,
) -> None:
    """Run one check, with the same random numbers for a seed every time; raise what it raises.

    What is raised has notes: where in the backend's code it was, and which call was the last.
    Raise `Skipped` whatever a check says that looks at no block of the scope, and `NotPromised` if
    the check guards a promise that the backend takes back, and all else is right.
    """
    if scope.widths is not None and name in TOO_LARGE:
        raise Skipped("of a model's widths its arrays would take gigabytes")
    rng = np.random.default_rng(seed_of(name) + scope.seed)
    guarding = guarding or Guarding(CHECKS[name].promise)
    trial = Trial(backend, ReferenceBackend(), rng, precision, scope, log or CallLog(), guarding)
    error = _raised(name, trial)
    if scope.patterns and not trial.log.has_looked:
        raise Skipped(OUT_OF_SCOPE)
    if error is not None:
        raise error
    guarding.conclude()


def _raised(name: str, trial: Trial) -> Exception | None:
    try:
        with np.errstate(all="ignore"):  # NaN and infinities are what some checks are about
            CHECKS[name].run(trial)
    except Exception as error:
        error.__notes__ = list(_notes(error, trial))
        return error
    return None


def _notes(error: Exception, trial: Trial) -> Iterator[str]:
    if not isinstance(error, CheckFailed | Skipped) and (place := place_of(error)) is not None:
        yield f"raised at {place}"
    if (note := trial.log.note()) is not None:
        yield note


def _said(error: Exception) -> str:
    """Return the message of a failed check, or the first line of another error with its type."""
    if isinstance(error, CheckFailed):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
