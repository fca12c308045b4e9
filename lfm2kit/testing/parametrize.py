"""The checks as pytest cases, for the tests of whoever writes a backend or a transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm2kit.backend import Backend, Context
from lfm2kit.building.plugins import find_transport, installed_plugins
from lfm2kit.precisions import Precision
from lfm2kit.promises import Promise
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.guarding import Guarding
from lfm2kit.testing.jobs import JOB_CHECKS, run_job_check
from lfm2kit.testing.runner import run_check
from lfm2kit.testing.scope import DEFAULT_SCOPE, Scope, examples_here
from lfm2kit.testing.selection import selected
from lfm2kit.testing.tracebacks import hide_frames
from lfm2kit.testing.verdicts import CheckFailed, NotPromised, Skipped

if TYPE_CHECKING:
    import pytest


class OnTrial(NamedTuple):
    """A backend in one of its precisions, and what it does not promise."""

    backend: Backend
    precision: Precision
    not_promised: Mapping[Promise, str]


class BackendCheck:
    """A check of a backend, to be called in a test; the first call creates the backend."""

    def __init__(self, name: str, create: Callable[[], OnTrial], scope: Scope) -> None:
        self.id = name
        self._create = create
        self._scope = scope

    def __call__(self) -> None:
        """Raise `CheckFailed`, or skip the test where the backend builds no such block.

        What is not promised is an expected failure, which pytest counts apart.
        """
        import pytest

        from lfm2kit.pytest_options import NOT_PROMISED  # which imports pytest

        backend, precision, not_promised = self._create()
        guarding = Guarding(CHECKS[self.id].promise, not_promised)
        try:
            run_check(self.id, backend, precision, self._scope, guarding=guarding)
        except Skipped as reason:
            pytest.skip(str(reason))
        except NotPromised as reason:
            pytest.xfail(f"{NOT_PROMISED}: {reason}")


def parametrize_backend_checks(
    backend: str,
    expected_failures: Mapping[str, str] | None = None,
    precision: str = "fp32",
    *,
    examples: int | None = None,
    seed: int = 0,
) -> pytest.MarkDecorator:
    """Return a decorator that makes a case for every check of an installed backend:

        @lfm2kit.testing.parametrize_backend_checks("mine", {"repeatable": "atomic additions"})
        def test_conformance(check):
            check()

    `expected_failures` maps check ids to reasons.  Such a check must fail: its passing is an
    error, so that the list stays true.  `examples` is the number of random ones of each kind of
    block, and another `seed` draws other inputs.  Raise `Lfm2kitError` for an unknown id, and if
    `examples` are asked for where hypothesis is not installed.
    """
    import pytest

    scope = Scope(seed, examples_here(examples))
    cases = backend_cases(backend, expected_failures, precision, scope)
    return pytest.mark.parametrize("check", cases)


def backend_cases(
    backend: str,
    expected_failures: Mapping[str, str] | None = None,
    precision: str = "fp32",
    scope: Scope = DEFAULT_SCOPE,
) -> list[Any]:
    """Return the cases of `parametrize_backend_checks`, with the ids of the checks."""
    import pytest

    expected = expected_failures or {}
    selected(expected)
    hide_frames()
    create = _created_once(backend, precision)
    marks = {name: pytest.mark.xfail(reason=why, strict=True) for name, why in expected.items()}
    return [
        pytest.param(BackendCheck(name, create, scope), id=name, marks=marks.get(name, ()))
        for name in CHECKS
    ]


def _created_once(name: str, precision: str) -> Callable[[], OnTrial]:
    """Create the backend when the first case asks for it: collecting tests stays free."""

    @cache
    def create() -> OnTrial:
        plugins = installed_plugins()
        backend = plugins.creator(Context(precision))(name)
        not_promised = plugins.backend(name).not_promised
        return OnTrial(backend, plugins.precision(name, precision), not_promised)

    return create


def parametrize_transport_checks(transport: str, ranks: int = 2) -> pytest.MarkDecorator:
    """Return a decorator that makes a case for every check of an installed transport:

        @lfm2kit.testing.parametrize_transport_checks("mine")
        def test_transport(check):
            check()

    Each starts a job of `ranks` ranks, as `lfm2kit transports check` does.
    """
    import pytest

    cases = [pytest.param(partial(_check_job, one, transport, ranks), id=one) for one in JOB_CHECKS]
    return pytest.mark.parametrize("check", cases)


def _check_job(name: str, transport: str, ranks: int) -> None:
    result = run_job_check(name, transport, find_transport(transport).launcher, ranks)
    if result.verdict == "failed":
        raise CheckFailed(result.detail)
