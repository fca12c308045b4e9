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

SCOPE = Scope(examples=5)  # many more are drawn by `lfm2kit backends check`
# Backends that break the contract knowingly, and where.
BLAS_SUMS = "BLAS sums in another order where there are other rows"  # see also its own tests
EXPECTED_FAILURES = {
    "blas": {
        "batch-independence": BLAS_SUMS,
        "experts-split-by-slot-bitwise": BLAS_SUMS,
        "whole-model-batch-independence": BLAS_SUMS,
        "random-calls": BLAS_SUMS,
        "random-programs": BLAS_SUMS,
        "rows-among-300": BLAS_SUMS,
        "rows-among-100000": BLAS_SUMS,
        "sequences-beyond-1024": BLAS_SUMS,
        "sequences-of-equal-length": BLAS_SUMS,
        "state-chunked-equals-one-shot": BLAS_SUMS,
        "state-decode-after-600-tokens": BLAS_SUMS,
        "state-page-sizes": BLAS_SUMS,
        "state-forks-share-pages": BLAS_SUMS,
        "state-steps-back": BLAS_SUMS,
        "state-belongs-to-its-caller": BLAS_SUMS,
        "state-of-an-empty-batch": BLAS_SUMS,
    },
}


def cases() -> Iterator[Any]:
    """Yield a case for each check and installed backend, skipped if the backend cannot run."""
    for name, installed in installed_plugins().backends.items():
        if (reason := installed.why_not) is not None:
            yield pytest.param(None, id=name, marks=pytest.mark.skip(reason))
            continue
        item = item_of(name, installed)
        for case in backend_cases(item, EXPECTED_FAILURES.get(name), scope=SCOPE):
            yield pytest.param(*case.values, id=f"{name}-{case.id}", marks=case.marks)


@pytest.mark.parametrize("check", list(cases()))
def test_backend(check: Any) -> None:
    check()


def test_all_our_backends_are_installed() -> None:
    """A backend of this repository that is not installed would go unjudged in silence."""
    root = Path(__file__).parents[2]
    projects = [*root.glob("backends/*/pyproject.toml"), *root.glob("plugins/*/pyproject.toml")]
    announced = set()
    for project in projects:
        table = tomllib.loads(project.read_text(encoding="utf-8"))
        announced |= table["project"].get("entry-points", {}).get(GROUP, {}).keys()
    assert announced <= {entry.name for entry in entry_points(group=GROUP)}


def test_every_check_is_documented() -> None:
    for check in CHECKS.values():
        assert check.summary.endswith((".", ":")) or len(check.documentation) > len(check.summary)
        assert len(check.summary) > 20
