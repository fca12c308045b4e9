"""Runs lfm2kit's checks on the transport: each starts a job of two ranks."""

from __future__ import annotations

from collections.abc import Callable

import lfm2kit.testing


@lfm2kit.testing.parametrize_transport_checks("$name", ranks=2)
def test_transport(check: Callable[[], None]) -> None:
    check()
