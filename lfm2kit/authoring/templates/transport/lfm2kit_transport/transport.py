"""A rank's collective operations, all made of one, in which ranks swap parts."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from lfm2kit.errors import BUG
from lfm2kit.progress import THIS_PROCESS
from lfm2kit.transport import World

BEAT = 0.1  # seconds between two reports of what this rank is doing

Rows = npt.NDArray[Any]


class SwitchedTransport:
    def __init__(self, world: World, descriptor: int) -> None:
        self.world = world
        self._connection: Connection[Any, Any] = Connection(descriptor)
        self._sending = threading.Lock()
        threading.Thread(target=self._report, daemon=True).start()

    def all_to_all(
        self,
        rows: Rows,
        send_counts: Sequence[int],
        receive_counts: Sequence[int] | None = None,
        into: Rows | None = None,
    ) -> tuple[Rows, list[int]]:
        came = self._swap(np.split(rows, np.cumsum(send_counts)[:-1]))
        return np.concatenate(came, out=into), [len(part) for part in came]

    def gather(self, rows: Rows, counts: Sequence[int] | None = None) -> Rows | None:
        came = self._swap([rows, *[None] * (self.world.size - 1)])
        return np.concatenate(came) if self.world.rank == 0 else None

    def barrier(self) -> None:
        self._swap([None] * self.world.size)

    def finish(self, exit_code: int) -> None:
        self._send("finish", exit_code)

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        sys.stdout.flush()
        self._send("abort", exit_code, reason, details)
        os._exit(exit_code)

    def _swap(self, parts: Sequence[Any]) -> list[Any]:
        """Send a part to each rank, and return those that came, in order of rank."""
        self._send("swap", parts)
        return list(self._connection.recv())

    def _send(self, *message: Any) -> None:
        with self._sending:
            self._connection.send(message)

    def _report(self) -> None:
        """Say again and again which step this rank is in, until nobody listens."""
        try:
            while True:
                self._send("step", THIS_PROCESS.now)
                time.sleep(BEAT)
        except OSError:  # the launching process is gone: leave no rank behind
            os._exit(BUG)
