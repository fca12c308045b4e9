"""The exchange on NumPy arrays, between ranks that are threads; on GPUs only its arrays differ."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lfm2kit_nccl.exchange import Meeting, _rounded
from lfm2kit_nccl.transport import NcclTransport

from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import PLAIN, Format, rounded
from lfm2kit.memory import HostMemory
from lfm2kit.testing import ThreadTransport, check_exchange, check_transport, run_ranks
from lfm2kit.testing.verdicts import CheckFailed
from lfm2kit.transport import World


class Gpu(HostMemory):
    """A memory by the name of a GPU's, which consists of NumPy arrays."""

    name = "lfm2kit_cuda:0"


class Between:
    """A communicator between threads."""

    arrays = np

    def __init__(self, transport: ThreadTransport) -> None:
        self._transport = transport

    def all_gather(self, array: Any) -> Any:
        return np.stack(self._transport.everyones(array.copy()))

    def swap(self, blocks: Any) -> Any:
        rank = self._transport.world.rank
        return np.stack([theirs[rank] for theirs in self._transport.everyones(blocks.copy())])


def over(transport: ThreadTransport, why_not: str | None = None) -> NcclTransport:
    """Return the transport of a rank, with a communicator between threads or without one."""
    memory, made = Gpu(), NcclTransport(transport)

    def connect(transport: Any, memory: Any) -> Any:
        return (Between(transport), None) if why_not is None else (None, why_not)

    made._meetings[memory.name] = Meeting(transport, memory, connect)
    return made


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_exchange_keeps_the_contract(size: int) -> None:
    run_ranks(size, lambda transport: check_exchange(over(transport), Gpu()))


@pytest.mark.parametrize("row_format", PLAIN, ids=str)
def test_rows_are_rounded_as_the_contract_says(row_format: Format) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (300, 65), dtype=np.uint32)
    x = bits.view(np.float32)
    x[0, :9] = [65519, 65520, -7e4, np.inf, -np.inf, 1 + 2**-8, 1 + 2**-11, 2**-25, -1.5 * 2**-24]
    rows = _rounded(np, x, row_format)
    assert rows.dtype == row_format.block
    assert rows.tobytes() == rounded(x, row_format).tobytes()


def test_the_transport_keeps_the_contract() -> None:
    run_ranks(3, lambda transport: check_transport(over(transport)), nodes=[0, 0, 1])


def test_blocks_in_other_memories_exchange_through_the_host() -> None:
    def rank(transport: ThreadTransport) -> None:
        assert over(transport).exchange_in(HostMemory()) is None
        check_exchange(over(transport))

    run_ranks(2, rank)


def test_a_forward_is_captured_only_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(transport: ThreadTransport) -> bool:
        offer = over(transport).exchange_in(Gpu())
        assert offer is not None
        return offer.is_capturable

    assert run_ranks(2, rank) == [False, False]
    monkeypatch.setenv("LFM2KIT_NCCL_CAPTURED", "1")
    assert run_ranks(2, rank) == [True, True]


def test_a_rank_without_nccl_says_so() -> None:
    def rank(transport: ThreadTransport) -> World:
        with pytest.raises(CheckFailed, match="cannot use the exchange: CuPy finds no NCCL"):
            check_exchange(over(transport, "CuPy finds no NCCL"), Gpu())
        return transport.world

    assert len(run_ranks(2, rank)) == 2


class NcclError(Exception):
    """What CuPy raises for an error of NCCL."""


def communicator_over(monkeypatch: pytest.MonkeyPatch, **nccl: Any) -> Any:
    """Return the module `communicator` on top of a CuPy over NumPy whose NCCL has these names."""
    module = ModuleType("cupy.cuda")
    module.nccl = SimpleNamespace(  # type: ignore[attr-defined]
        available=True, NcclError=NcclError, NCCL_UINT8=1, **nccl
    )
    module.get_current_stream = lambda: SimpleNamespace(ptr=0)  # type: ignore[attr-defined]
    names = {"ascontiguousarray": lambda a: a.view(Addressed), "empty": np.empty}
    like = {"empty_like": lambda a: np.empty_like(a).view(Addressed)}
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=module, **names, **like))
    monkeypatch.setitem(sys.modules, "cupy.cuda", module)
    monkeypatch.delitem(sys.modules, "lfm2kit_nccl.communicator", raising=False)
    found = import_module("lfm2kit_nccl.communicator")
    monkeypatch.delitem(sys.modules, "lfm2kit_nccl.communicator")
    return found


class Addressed(np.ndarray):
    """An array whose memory is asked for as CuPy's is."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


def test_where_rank_0_gets_no_id_no_rank_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_unique_id() -> Any:
        raise NcclError("unhandled system error")

    connected = communicator_over(monkeypatch, get_unique_id=get_unique_id).connected
    found = run_ranks(2, lambda transport: connected(transport, Gpu()), patience=20)
    assert found == [(None, "NCCL says unhandled system error"), (None, None)]


def test_an_error_of_nccl_is_one_line_and_leaves_no_group_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_groups: list[bool] = []

    def send(*arguments: Any) -> None:
        assert open_groups, "sends and receives belong together"
        raise NcclError("remote process exited")

    module = communicator_over(
        monkeypatch,
        groupStart=lambda: open_groups.append(True), groupEnd=open_groups.pop,
        NcclCommunicator=lambda size, unique_id, rank: SimpleNamespace(send=send),
    )  # fmt: skip
    communicator = module.Nccl(2, bytes(128), 0)
    with pytest.raises(Lfm2kitError, match=r"^NCCL says remote process exited$"):
        communicator.swap(np.zeros((2, 3), np.float32))
    assert not open_groups
