"""Every installed backend before the conformance suite."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.building.plugins import GROUP, installed_plugins
from lfm2kit.testing import CHECKS
from lfm2kit.testing.parametrize import backend_cases
from lfm2kit.testing.scope import Scope
from tests.conformance.installed import item_of

BY_THEIR_OWN_TESTS = {"blas"}  # are judged each time, in the same precision and by more examples
SCOPE = Scope(examples=5)  # many more are drawn by `lfm2kit backends check`


def cases() -> Iterator[Any]:
    """Yield a case for each check and installed backend, skipped if the backend cannot run."""
    for name, installed in installed_plugins().backends.items():
        if (reason := installed.why_not) is not None:
            yield pytest.param(None, id=name, marks=pytest.mark.skip(reason))
            continue
        item = item_of(name, installed)
        for case in backend_cases(item, scope=SCOPE):
            marks = [*case.marks, *[pytest.mark.long] * (name in BY_THEIR_OWN_TESTS)]
            yield pytest.param(*case.values, id=f"{name}-{case.id}", marks=marks)


@pytest.mark.parametrize("check", list(cases()))
def test_backend(check: Any) -> None:
    check()


def test_all_our_backends_are_installed() -> None:
    """A backend of this repository that is not installed would go unjudged in silence.

    PyTorch, of several gigabytes, is not installed for tests: lfm2kit-torch is judged where it is.
    """
    root = Path(__file__).parents[2]
    projects = [*root.glob("backends/*/pyproject.toml"), *root.glob("plugins/*/pyproject.toml")]
    announced = set()
    for project in projects:
        table = tomllib.loads(project.read_text(encoding="utf-8"))
        announced |= table["project"].get("entry-points", {}).get(GROUP, {}).keys()
    assert announced - {"torch"} <= {entry.name for entry in entry_points(group=GROUP)}


def test_every_check_is_documented() -> None:
    for check in CHECKS.values():
        assert check.summary.endswith((".", ":")) or len(check.documentation) > len(check.summary)
        assert len(check.summary) > 20
