"""Runs lfm2kit's conformance suite on the backend, with a test for each check."""

from __future__ import annotations

from collections.abc import Callable

import lfm2kit.testing


@lfm2kit.testing.parametrize_backend_checks("$name", expected_failures={})
def test_conformance(check: Callable[[], None]) -> None:
    check()
