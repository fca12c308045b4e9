"""Ranks that exchange tokens between GPUs make, grow and give back their memory together.

Their GPUs are a CuPy over NumPy arrays, and the ranks threads, which all see the same addresses.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.compiling import SOURCES
from lfm2kit_cuda.exchange_size import Size

from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32, PLAIN, Format
from lfm2kit.progress import COMPILING, THIS_PROCESS
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import ExchangeError, ExchangesOver, Traffic, evenly, held_once
from tests.cuda import late_cupy

RANKS, EXPERTS, K, WIDTH = 3, 12, 2, 8
TRAFFIC = Traffic(WIDTH, K, held_once(evenly(RANKS, EXPERTS), RANKS))


class CudaError(RuntimeError):
    """What CuPy raises for an error of CUDA."""


class Runtime:
    """CUDA's calls for memory, which note what is there and who has mapped it."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.mapped: Counter[int] = Counter()
        self.may_allocate: Callable[[], bool] = lambda: True
        self.may_map: Callable[[], bool] = lambda: True
        self.may_unmap: Callable[[], bool] = lambda: True

    def malloc(self, nbytes: int) -> int:
        if not self.may_allocate():
            raise CudaError("cudaErrorMemoryAllocation: out of memory")
        block = np.full(nbytes, 0xA5, np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def memset(self, address: int, value: int, nbytes: int) -> None:
        self.blocks[address][:nbytes] = value

    def free(self, address: int) -> None:
        assert not self.mapped[address], "memory is given back that another rank has mapped"
        del self.blocks[address]

    def ipc_get(self, address: int) -> bytes:
        return address.to_bytes(64, "little")

    def ipc_open(self, handle: bytes) -> int:
        if not self.may_map():
            raise CudaError("cudaErrorPeerAccessUnsupported: peer access is not supported")
        address = int.from_bytes(handle, "little")
        assert not self.blocks[address].any(), "a block is not all zeros"
        self.mapped[address] += 1
        return address

    def ipc_close(self, address: int) -> None:
        if not self.may_unmap():
            raise CudaError("cudaErrorIllegalAddress: an illegal memory access was encountered")
        self.mapped[address] -= 1

    def memcpy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        ctypes.memmove(target, source, nbytes)


class World(SimpleNamespace):
    """The modules, the runtime under them, and the kernels that were launched."""

    modules: Any
    runtime: Runtime
    launched: list[tuple[str, tuple[Any, ...]]]
    greets: bool


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    names = ("meeting", "peers", "exchange", "mailboxes")
    with late_cupy.loaded(*names) as loaded:
        made = World(
            modules=SimpleNamespace(**dict(zip(names, loaded, strict=True))),
            runtime=Runtime(), launched=[], greets=True,
        )  # fmt: skip
        fake = made.modules.peers.runtime
        for name, call in {
            "malloc": made.runtime.malloc, "free": made.runtime.free,
            "memset": made.runtime.memset, "memcpy": made.runtime.memcpy,
            "ipcGetMemHandle": made.runtime.ipc_get, "ipcOpenMemHandle": made.runtime.ipc_open,
            "ipcCloseMemHandle": made.runtime.ipc_close, "deviceSynchronize": lambda: None,
            "memcpyDeviceToHost": 2, "CUDARuntimeError": CudaError,
        }.items():  # fmt: skip
            monkeypatch.setattr(fake, name, call, raising=False)
        driver = SimpleNamespace(CUDADriverError=CudaError)
        monkeypatch.setattr(made.modules.peers.cupy.cuda, "driver", driver, raising=False)

        def kernel(stem: str, name: str, **constants: Any) -> Any:
            def launch(grid: Any, threads: int, *arguments: Any) -> None:
                made.launched.append((name, arguments))
                if name == "greet_peers" and made.greets:
                    base, rank, ranks, word = arguments
                    for address in base.values[:ranks]:
                        ctypes.c_int32.from_address(int(address) + 4 * rank).value = word

            return launch

        for name in ("peers", "exchange"):
            monkeypatch.setattr(getattr(made.modules, name), "load_kernel", kernel)
        for name in ("peers", "exchange", "mailboxes"):  # at once: ranks share the device's streams
            uploaded = getattr(made.modules, name)
            monkeypatch.setattr(uploaded, "upload", lambda array: late_cupy.Array(array.copy()))
        yield made


def of_rank(rank: int) -> Callable[[], bool]:
    """Return a condition that does not hold in the thread of a rank, which `as_rank` has named."""
    return lambda: getattr(late_cupy.THREAD, "rank", None) != rank


def meeting_of(world: World, transport: ThreadTransport) -> Any:
    late_cupy.THREAD.rank = transport.world.rank
    return world.modules.meeting.Meeting(0, transport)


def assert_nothing_is_left(world: World) -> None:
    assert not world.runtime.blocks
    assert not +world.runtime.mapped


def test_ranks_that_reach_each_other_find_that_and_leave_nothing(world: World) -> None:
    found = run_ranks(RANKS, lambda transport: meeting_of(world, transport).why_not())
    assert found == [None] * RANKS
    assert_nothing_is_left(world)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ("may_allocate", "cudaErrorMemoryAllocation: out of memory"),
        ("may_map", "cudaErrorPeerAccessUnsupported: peer access is not supported"),
    ],
)
def test_a_rank_that_cannot_says_why_and_nothing_is_left(world: World, step: str, why: str) -> None:
    setattr(world.runtime, step, of_rank(1))
    found = run_ranks(RANKS, lambda transport: meeting_of(world, transport).why_not())
    assert found == [None, f"CUDA says {why}", None]
    assert_nothing_is_left(world)


def test_a_rank_to_which_nothing_comes_says_so_and_nothing_is_left(world: World) -> None:
    world.greets = False
    found = run_ranks(RANKS, lambda transport: meeting_of(world, transport).why_not())
    assert found == ["nothing has come from the GPU of rank 0", None, None]
    assert_nothing_is_left(world)


def test_ranks_on_several_machines_do_not_even_try(world: World) -> None:
    def rank(transport: ThreadTransport) -> str:
        return str(meeting_of(world, transport).why_not())

    why = "the ranks that share experts are on several machines"
    assert run_ranks(RANKS, rank, nodes=[0, 0, 1]) == [why] * RANKS
    assert not world.launched


def test_the_largest_rank_settles_a_forward_and_memory_grows_when_it_must(world: World) -> None:
    forwards = [(0, 3, 1), (2, 0, 5), (0, 0, 0), (70, 1, 1), (1, 1, 9)]

    def rank(transport: ThreadTransport) -> Any:
        meeting = meeting_of(world, transport)
        meeting.create(TRAFFIC)
        settled = []
        for tokens in forwards:
            with meeting.around(tokens[transport.world.rank]) as agreed:
                settled.append(agreed)
                sizes = [len(block) for block in world.runtime.blocks.values()]
                transport.barrier()
                assert len(sizes) >= RANKS
        return settled, meeting.mailboxes.size

    for settled, size in run_ranks(RANKS, rank):
        assert settled == [(3, 1), (5, 1), (1, 1), (70, 2), (9, 2)]
        assert size == Size(128, K, WIDTH, 4)
    assert len(world.runtime.blocks) == RANKS
    assert set(world.runtime.mapped.values()) <= {0, RANKS - 1}


@pytest.mark.parametrize(
    ("step", "said", "left"),
    [
        (
            "may_allocate",
            "cudaErrorMemoryAllocation: out of memory; .* for 1000 tokens of each rank; try fewer "
            "tokens at once, or exchange='host'",
            0,
        ),
        (
            "may_unmap",
            "cudaErrorIllegalAddress: an illegal memory access was encountered; its GPU cannot "
            "give back the exchange's memory: start the job again",
            RANKS,  # blocks, of which some are still mapped
        ),
    ],
)
def test_a_rank_that_cannot_make_its_mailbox_larger_is_named_by_all(
    world: World, step: str, said: str, left: int
) -> None:
    def rank(transport: ThreadTransport) -> str:
        meeting = meeting_of(world, transport)
        meeting.create(TRAFFIC)
        with meeting.around(4):
            pass
        transport.barrier()
        setattr(world.runtime, step, of_rank(2))
        with pytest.raises(Lfm2kitError) as error, meeting.around(1000):
            pass
        return str(error.value)

    (sentence,) = set(run_ranks(RANKS, rank))
    assert re.fullmatch(f"rank 2: CUDA says {said}", sentence)
    assert len(world.runtime.blocks) == left
    assert bool(+world.runtime.mapped) == bool(left)


def test_after_too_many_tokens_fewer_need_no_more_memory_than_they_do_alone(world: World) -> None:
    def rank(transport: ThreadTransport) -> Size:
        meeting = meeting_of(world, transport)
        meeting.create(TRAFFIC)
        transport.barrier()
        world.runtime.may_allocate = lambda: False
        with pytest.raises(Lfm2kitError, match="try fewer tokens"), meeting.around(1000):
            pass
        transport.barrier()
        world.runtime.may_allocate = lambda: True
        with meeting.around(4):
            return meeting.mailboxes.size

    assert run_ranks(RANKS, rank) == [Size(64, K, WIDTH, 4)] * RANKS


@pytest.mark.parametrize(
    ("formats", "element"), [((BF16, BF16), 2), ((F16, F32, BF16), 4)], ids=["16 bits", "mixed"]
)
def test_mailboxes_have_room_for_the_widest_rows_of_all_layers(
    world: World, formats: tuple[Format, ...], element: int
) -> None:
    def rank(transport: ThreadTransport) -> Size:
        meeting = meeting_of(world, transport)
        for row_format in formats:
            meeting.create(TRAFFIC._replace(row_format=row_format))
        with meeting.around(4):
            return meeting.mailboxes.size

    assert run_ranks(RANKS, rank) == [Size(64, K, WIDTH, element)] * RANKS


def test_rows_of_16_bits_take_half_of_the_memory_and_products_as_much(world: World) -> None:
    def rank(transport: ThreadTransport) -> list[int]:
        meeting = meeting_of(world, transport)
        return [meeting.scratch_bytes(TRAFFIC._replace(row_format=f), 64) for f in (F32, BF16)]

    rows = 64 * RANKS + 64 * RANKS * K  # in the mailbox, and those that experts get
    for wide, narrow in run_ranks(RANKS, rank):
        assert wide - narrow == 2 * rows * WIDTH


def test_what_is_counted_in_16_bits_has_half_of_the_bytes_of_rows(world: World) -> None:
    def rank(transport: ThreadTransport) -> Any:
        meeting = meeting_of(world, transport)
        numbers = np.array([1, 5, 7, 11, 0, 0, *[2] * EXPERTS], np.int64)  # as exchange.cu counts
        return [meeting.create(TRAFFIC._replace(row_format=f))._counts(numbers) for f in (F32, F16)]

    for wide, narrow in run_ranks(RANKS, rank):
        assert wide.dispatch.bytes - narrow.dispatch.bytes == 7 * 2 * WIDTH
        assert wide.dispatch.header_bytes == narrow.dispatch.header_bytes
        assert wide.combine == narrow.combine


def test_a_failure_names_rank_and_exchange_and_no_forward_follows(world: World) -> None:
    def rank(transport: ThreadTransport) -> None:
        meeting = meeting_of(world, transport)
        layers = [meeting.create(TRAFFIC) for _ in range(3)]
        with meeting.around(4):
            assert meeting.mailboxes.deadline > COMPILING  # the others may compile kernels
        with pytest.raises(ExchangeError) as late, meeting.around(4):
            meeting.mailboxes._words[1] = 2 << 8 | (1 + 2 * 1 + 0)  # as exchange.cu notes it
        assert late.value.exchange is layers[2]
        said = "".join(map(str, late.value.args))
        seconds = f"{0.8 * THIS_PROCESS.deadline:g}"
        assert said == (
            f"rank 1 of the 3 that share experts has sent nothing for {seconds} s; if it is only "
            "slow, give a longer deadline"
        )
        with pytest.raises(ExchangeError), meeting.around(4):
            raise AssertionError("a forward began after a failure")

    run_ranks(RANKS, rank)


def test_a_forward_that_fails_on_the_host_ends_the_waits_of_its_kernels(world: World) -> None:
    def rank(transport: ThreadTransport) -> None:
        meeting = meeting_of(world, transport)
        meeting.create(TRAFFIC)
        with pytest.raises(ZeroDivisionError), meeting.around(4):
            raise ZeroDivisionError
        assert meeting.mailboxes._words[0] == 1
        with meeting.around(4):  # no kernel has seen it
            assert meeting.mailboxes._words[0] == 0

    run_ranks(RANKS, rank)


def test_a_memory_has_one_meeting_for_the_ranks_of_a_transport() -> None:
    with late_cupy.loaded("memory") as (module,):
        memory = module.memory_of(1)
        assert isinstance(memory, ExchangesOver)

        def rank(transport: ThreadTransport) -> None:
            first, again = (memory.exchange_over(transport) for _ in range(2))
            assert (first.memory, first.is_capturable) == (memory, True)
            assert first.create.__self__ is again.create.__self__
            other = memory.exchange_over(transport.group([transport.world.rank]))
            assert other.create.__self__ is not first.create.__self__

        run_ranks(2, rank)


def test_ranks_share_a_gpu_only_if_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with late_cupy.loaded("memory") as (module,):
        monkeypatch.setattr(module, "identity", lambda device: f"number {device}")
        memory = module.memory_of(1)
        assert memory.unit() == "the GPU number 1"
        monkeypatch.setenv("LFM2KIT_CUDA_SHARED", "1")
        assert memory.unit() == f"the GPU number 1, shared by process {os.getpid()}"


PARAMETERS = re.compile(
    r'extern "C" __global__ void\s+__launch_bounds__\(kThreads\)\s+(\w+)\(([^)]*)\)'
)


@pytest.mark.parametrize("row_format", PLAIN, ids=str)
def test_kernels_are_launched_with_the_arguments_that_they_have(
    world: World, row_format: Format
) -> None:
    def rank(transport: ThreadTransport) -> None:
        meeting = meeting_of(world, transport)
        exchange = meeting.create(TRAFFIC._replace(row_format=row_format))
        with meeting.around(5):
            x, weights = (late_cupy.empty((5, w), np.float32) for w in (WIDTH, K))
            rows = exchange.dispatch(x, late_cupy.empty((5, K), np.int32), weights)
            assert rows.x.shape == (RANKS * 5 * K, WIDTH)
            assert rows.x.dtype == row_format.block
            assert rows.expert_ids.shape == rows.expert_weights.shape == (RANKS * 5 * K, 1)
            products = late_cupy.empty(rows.x.shape, np.float32)
            assert exchange.combine(products).shape == (5, WIDTH)

    run_ranks(RANKS, rank)
    text = "".join((SOURCES / name).read_text() for name in ("exchange.cu", "peers.cu"))
    declared = {name: words.split(",") for name, words in PARAMETERS.findall(text)}
    launched = dict(world.launched)
    assert set(launched) == {"send_tokens", "take_rows", "send_products", "add_products"}
    for name, arguments in launched.items():
        is_pointer = ["*" in words for words in declared[name]]
        assert [not isinstance(argument, int) for argument in arguments] == is_pointer, name
        for words, argument in zip(declared[name], arguments, strict=True):
            dtype = getattr(argument, "dtype", None)
            if dtype is not None:
                kind = {"float": np.float32, "int": np.int32, "u64": np.uint64}
                kind["Row"] = row_format.block
                wanted = next((kind[w] for w in kind if f"{w}*" in words), None)
                assert wanted is None or dtype == wanted, (name, words)


def test_more_tokens_than_the_ranks_have_settled_on_are_refused(world: World) -> None:
    def rank(transport: ThreadTransport) -> None:
        meeting = meeting_of(world, transport)
        exchange = meeting.create(TRAFFIC)
        x, weights = (late_cupy.empty((5, w), np.float32) for w in (WIDTH, K))
        ids, said = late_cupy.empty((5, K), np.int32), "5 tokens, but the ranks have settled on 4"
        with pytest.raises(ValueError, match=said), meeting.around(4):
            exchange.dispatch(x, ids, weights)

    run_ranks(RANKS, rank)
