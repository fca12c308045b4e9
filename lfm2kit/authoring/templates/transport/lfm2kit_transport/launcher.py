"""Starts the ranks of a job, and lets each of them join it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lfm2kit import Lfm2kitError
from lfm2kit.errors import Option
from lfm2kit.transport import Transport, World, rank_command

# A rank's number, the number of ranks, and the rank's connection to the switch.  Not
# called LFM2KIT_...: such variables have to be the same on all ranks.
JOB = "${variable}_JOB"
MOST_PER_CORE = 8  # ranks


class SwitchLauncher:
    def world_size(self) -> int | None:
        """Return the number of ranks of this process's job; None outside any job."""
        words = os.environ.get(JOB, "").split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else None

    def launch(self, ranks: int, arguments: Sequence[str]) -> int:
        from .switch import run_job

        most = MOST_PER_CORE * (os.cpu_count() or 1)
        if ranks > most:
            said = f": at most {most}, {MOST_PER_CORE} for each core of this machine"
            raise Lfm2kitError(Option("ranks", ranks), said)
        return run_job(ranks, rank_command(arguments), JOB)

    def connect(self) -> Transport:
        from .transport import SwitchedTransport

        rank, size, descriptor = map(int, os.environ[JOB].split())
        return SwitchedTransport(World.of(rank, [0] * size), descriptor)
