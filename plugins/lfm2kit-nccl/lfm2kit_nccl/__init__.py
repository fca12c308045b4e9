"""The transport "nccl": MPI's ranks, whose GPUs exchange tokens over NCCL.  Imports no CuPy."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit
from lfm2kit_nccl.transport import NcclLauncher, NcclTransport

__all__ = ["NcclTransport", "lfm2kit_transports"]


@lfm2kit.hookimpl
def lfm2kit_transports() -> Iterator[lfm2kit.TransportPlugin]:
    summary = "MPI, with tokens that travel between GPUs over NCCL"
    yield lfm2kit.TransportPlugin("nccl", summary, NcclLauncher())
