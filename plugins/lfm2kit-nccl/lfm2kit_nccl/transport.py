"""MPI's transport with one addition: `exchange_in`, for the memory of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy.typing as npt
from lfm2kit_mpi.launcher import MpiLauncher

from lfm2kit.memory import Memory
from lfm2kit.transport import (
    Aside,
    ExchangeOffer,
    FormsGroups,
    SharesMemory,
    Transport,
    WorksAside,
    World,
)
from lfm2kit_nccl.exchange import Meeting

OF_CUDA = "lfm2kit_cuda:"  # begins the names of memories whose arrays are CuPy's


class NcclLauncher(MpiLauncher):
    def connect(self) -> Transport:
        return NcclTransport(super().connect())


class NcclTransport:
    """Another transport, whose collectives it uses, with an exchange over NCCL."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._meetings: dict[str, Meeting] = {}

    @property
    def world(self) -> World:
        return self._transport.world

    def exchange_in(self, memory: Memory) -> ExchangeOffer | None:
        if not memory.name.startswith(OF_CUDA):
            return None
        if memory.name not in self._meetings:
            from lfm2kit_nccl.communicator import connected

            self._meetings[memory.name] = Meeting(self._transport, memory, connected)
        return self._meetings[memory.name].offer()

    def group(self, ranks: Sequence[int]) -> Transport:
        assert isinstance(self._transport, FormsGroups)  # as MPI's does
        return NcclTransport(self._transport.group(ranks))

    def aside(self, purpose: str) -> Aside | None:
        """Return the other transport aside, which has no exchange over NCCL."""
        return self._transport.aside(purpose) if isinstance(self._transport, WorksAside) else None

    def all_to_all(
        self,
        rows: npt.NDArray[Any],
        send_counts: Sequence[int],
        receive_counts: Sequence[int] | None = None,
        into: npt.NDArray[Any] | None = None,
    ) -> tuple[npt.NDArray[Any], list[int]]:
        return self._transport.all_to_all(rows, send_counts, receive_counts, into)

    def gather(
        self, rows: npt.NDArray[Any], counts: Sequence[int] | None = None
    ) -> npt.NDArray[Any] | None:
        return self._transport.gather(rows, counts)

    def shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        assert isinstance(self._transport, SharesMemory)  # as MPI's does
        return self._transport.shared(shape, dtype)

    def barrier(self) -> None:
        self._transport.barrier()

    def finish(self, exit_code: int) -> None:
        self._transport.finish(exit_code)

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        self._transport.abort(exit_code, reason, details)
