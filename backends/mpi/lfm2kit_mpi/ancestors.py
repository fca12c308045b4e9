"""Finds the launcher that started a rank, if it runs on the same machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LAUNCHERS = {"mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun"}


class Launcher:
    """A process to be signalled; a later process with its id never gets the signal."""

    def __init__(self, pid: int) -> None:
        self._process = os.pidfd_open(pid)

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, number)


def launcher_of(pid: int) -> Launcher | None:
    """Return the nearest ancestor of `pid` that is an MPI launcher of this user, if any."""
    if not hasattr(os, "pidfd_open"):
        return None
    with suppress(OSError):
        for ancestor in _ancestors(pid):
            process = Path("/proc", str(ancestor))
            is_launcher = (process / "comm").read_text().strip() in LAUNCHERS
            if is_launcher and process.stat().st_uid == os.geteuid():
                return Launcher(ancestor)
    return None


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        pid = int(fields[1])
        yield pid
