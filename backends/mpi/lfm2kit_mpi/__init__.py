"""The MPI transport.  Nothing starts MPI before a job's process connects."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit
from lfm2kit_mpi.launcher import MpiLauncher


@lfm2kit.hookimpl
def lfm2kit_transports() -> Iterator[lfm2kit.TransportPlugin]:
    yield lfm2kit.TransportPlugin("mpi", "MPI, staged through the host", MpiLauncher())
