"""What all tests need of the process that they run in."""

from __future__ import annotations

import signal

import pytest

from tests.checkpoint.typed import Cli


def pytest_configure() -> None:
    """Let commands that tests start be interrupted.

    A script's shell starts what runs in the background (`./check.sh &`) with SIGINT ignored, and
    every process that comes of it inherits that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run commands in this process."""
    return Cli(monkeypatch, capsys)
