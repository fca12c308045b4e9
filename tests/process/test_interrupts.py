"""Ctrl-C that somebody else wants to hear of ends nothing; other signals do."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from lfm2kit.process.interrupts import Interrupted, Interrupts


class WatchedError(Exception):
    """The watching thread has taken a signal for the end."""


def test_a_ctrl_c_that_is_heard_ends_nothing() -> None:
    interrupts, heard = Interrupts(), list[int]()
    interrupts.give_ctrl_c_to(lambda: heard.append(1))
    interrupts._handle(signal.SIGINT, None)
    interrupts._handle(signal.SIGINT, None)
    interrupts.check()
    assert len(heard) == 2
    with pytest.raises(Interrupted):
        interrupts._handle(signal.SIGTERM, None)
    assert len(heard) == 2


def test_ctrl_c_ends_the_process_again_when_nobody_hears() -> None:
    interrupts = Interrupts()
    interrupts.give_ctrl_c_to(lambda: None)
    interrupts.give_ctrl_c_to(None)
    with pytest.raises(Interrupted):
        interrupts._handle(signal.SIGINT, None)


@pytest.mark.parametrize(("is_heard", "taken"), [(True, 3), (False, 1)])
def test_the_watching_thread_passes_over_what_is_heard(
    is_heard: bool, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise WatchedError

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0)
    monkeypatch.setattr("lfm2kit.process.interrupts.time", clock)
    interrupts = Interrupts()
    interrupts.give_ctrl_c_to((lambda: None) if is_heard else None)
    reader, writer = os.pipe()
    try:
        os.write(writer, bytes([signal.SIGINT, signal.SIGINT, signal.SIGTERM, 0]))
        with pytest.raises(WatchedError):
            interrupts._watch(reader)
        assert len(os.read(reader, 9)) == 4 - taken
    finally:
        os.close(reader)
        os.close(writer)
