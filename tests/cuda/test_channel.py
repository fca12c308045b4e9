"""Where a call's arrays lie in the host's memory, and which threads copy them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.arguments import _code
from lfm2kit_cuda.compiling import SOURCES
from lfm2kit_cuda.constants import CHANNEL
from lfm2kit_cuda.host_layout import (
    MOST_ARRAYS,
    MOST_BYTES,
    MOST_CTAS,
    VECTOR,
    WARP,
    Layout,
    receiving_grid,
    sending_grid,
)

from lfm2kit.backend import ArrayForm, Signals
from tests.cuda import late_cupy

LINE = VECTOR * CHANNEL.LINE


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (16, 64), (65, 0, 1, 4), (0, 2048, 17)])
def test_each_array_begins_a_line_and_has_all_its_bytes(sizes: tuple[int, ...]) -> None:
    layout = Layout.of(sizes)
    ends = [start + size for start, size in zip(layout.starts, sizes, strict=True)]
    assert all(start % LINE == 0 for start in layout.starts)
    assert all(a <= b for a, b in zip([0, *ends], [*layout.starts, layout.nbytes], strict=True))
    assert layout.nbytes % LINE == 0
    assert layout.nbytes - sum(sizes) < LINE * max(len(sizes), 1)
    assert len(layout.vectors) == MOST_ARRAYS
    assert all(VECTOR * n >= size for n, size in zip(layout.vectors, sizes, strict=False))


def test_kernels_find_each_array_where_the_host_does() -> None:
    """As channel.cu adds up what it gets."""
    sizes = (65, 0, 128, 4)
    layout, place = Layout.of(sizes), 0
    for start, vectors in zip(layout.starts, layout.vectors, strict=True):
        assert start == VECTOR * place
        place += (vectors + CHANNEL.LINE - 1) // CHANNEL.LINE * CHANNEL.LINE
    assert place == layout.places


@pytest.mark.parametrize("sizes", [(1,) * (MOST_ARRAYS + 1), (MOST_BYTES, 1)])
def test_what_kernels_cannot_copy_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"at most {MOST_ARRAYS} arrays .* {len(sizes)} arrays"):
        Layout.of(sizes)


@pytest.mark.parametrize("places", [0, 1, 4, 128, 2048, 16384, 10**8])
@pytest.mark.parametrize("workers", [1, 8, 300, CHANNEL.MOST_THREADS])
def test_grids_are_launched_whatever_the_size(places: int, workers: int) -> None:
    for ctas, threads in (sending_grid(places), receiving_grid(places, workers)):
        assert 1 <= ctas <= MOST_CTAS
        assert threads % WARP == 0
        assert WARP <= threads <= CHANNEL.MOST_THREADS
    assert receiving_grid(places, workers)[1] >= workers


def test_arrays_of_a_few_tokens_need_one_cta() -> None:
    of_scores = Layout.of([16 * 32 * 4]).places
    assert sending_grid(of_scores) == (1, 128)
    for tokens, threads in ((16, 32), (256, 128), (2048, 1024)):
        of_choices = Layout.of([tokens * 4 * 4] * 2).places
        assert receiving_grid(of_choices, 1) == (1, threads)


def test_kernels_count_the_vectors_of_the_largest_call() -> None:
    """With 31 bits, and as far beyond the end as a grid goes in one step."""
    layout = Layout.of([MOST_BYTES - 65, 1, 64])
    grid, threads = receiving_grid(layout.places, 1)
    assert layout.places + grid * threads * CHANNEL.OF_THREAD < 2**31


# A channel, without the kernels.


class Kernels:
    """Instead of a source's kernels: what they were launched with."""

    def __init__(self) -> None:
        self.launches: dict[str, tuple[Any, ...]] = {}

    def load(self, stem: str, name: str) -> Callable[..., None]:
        return lambda grid, threads, *arguments: self.launches.update({name: arguments})


@pytest.fixture
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def channel(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with late_cupy.loaded("memory", "channel") as (memory, module):
        for name, value in {
            "load_kernel": kernels.load, "_empty": late_cupy.empty, "_whole_vectors": lambda a: a
        }.items():  # fmt: skip
            monkeypatch.setattr(module, name, value)
        assert isinstance(memory.memory_of(1), Signals)
        yield memory.memory_of(1).channel(3, 5.0)


def form(*shape: int, dtype: type = np.float32) -> ArrayForm:
    return ArrayForm(shape, np.dtype(dtype))


def test_nothing_has_been_sent_at_first(channel: Any) -> None:
    assert (channel.sent.shape, channel.failed.shape) == ((3,), (2,))
    assert channel.answered.shape == (3, 16)
    assert (channel.deadline.dtype, channel.deadline.tolist()) == (np.float32, [5.0])
    for words in (channel.sent, channel.failed, channel.answered):
        assert words.dtype == np.uint32
        assert not words.any()


def test_words_that_different_threads_write_share_no_line(channel: Any) -> None:
    first = channel.sent.ctypes.data
    answers = [channel.answered[i].ctypes.data for i in range(3)]
    lines = [(address - first) // LINE for address in (channel.failed.ctypes.data, *answers)]
    assert len({0, *lines}) == 5


def test_calls_share_their_arrays_and_none_of_a_call_overlap(channel: Any) -> None:
    calls = [
        channel.call([form(5, 3), form(7, dtype=np.uint8)], [form(5, 2, dtype=np.int32)], 2),
        channel.call([form(4)], [form(0, 4), form(9)], 1),
    ]
    assert [call.number for call in calls] == [0, 1]
    for call in calls:
        arrays = [*call.inputs, *call.results]
        for value, array in enumerate(arrays):
            array[...] = value
        assert all((array == value).all() for value, array in enumerate(arrays))
    assert np.shares_memory(calls[0].inputs[0], calls[1].inputs[0])
    assert calls[0].results[0].dtype == np.int32
    assert [array.shape for array in calls[1].results] == [(0, 4), (9,)]


def test_a_larger_call_leaves_the_arrays_of_former_ones_where_they_are(channel: Any) -> None:
    small = channel.call([form(4)], [form(4)], 1)
    small.inputs[0][...] = 7
    large = channel.call([form(1 << 20)], [form(1 << 20)], 1)
    large.inputs[0][...] = 8
    large.results[0][...] = 9
    assert not np.shares_memory(small.inputs[0], large.inputs[0])
    assert (small.inputs[0] == 7).all()
    again = channel.call([form(1 << 20)], [form(4)], 1)
    assert np.shares_memory(large.inputs[0], again.inputs[0])


def test_memory_that_the_system_does_not_pin_is_a_memory_error(
    channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(nbytes: int, flags: int) -> None:
        error = cuda.runtime.CUDARuntimeError()
        error.status = 2  # cudaErrorMemoryAllocation
        raise error

    cuda = channel.call.__globals__["cupy"].cuda
    channel.call([form(4)], [form(4)], 1)
    monkeypatch.setattr(cuda, "PinnedMemory", refuse)
    channel.call([form(8)], [form(8)], 1)
    with pytest.raises(MemoryError, match=r"does not pin 3\.0 GB more"):
        channel.call([form(500_000_000)], [form(250_000_000)], 1)


@pytest.mark.parametrize("workers", [0, 4])
def test_a_call_that_would_wait_for_nobody_is_refused(channel: Any, workers: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 3 workers, not {workers}"):
        channel.call([], [], workers)


def test_more_workers_than_a_kernel_looks_at_are_refused() -> None:
    with (
        late_cupy.loaded("memory") as (memory,),
        pytest.raises(ValueError, match=f"1 to {CHANNEL.MOST_THREADS} workers, not 2000"),
    ):
        memory.memory_of(0).channel(2000, 5.0)


def declared(kernel: str) -> str:
    """Return the parameters that channel.cu declares, in the letters of `arguments`."""
    source = (SOURCES / "channel.cu").read_text(encoding="utf-8")
    found = re.search(rf"\n +{kernel}\(([^)]*)\) {{", source)
    assert found
    parameters = found[1].split(",")
    return "".join("P" if "*" in p else "f" if "float" in p else "i" for p in parameters)


def test_kernels_get_what_they_declare(channel: Any, kernels: Kernels) -> None:
    arrays = [late_cupy.empty((4, 2), np.float32), late_cupy.empty((5,), np.int32)]
    call = channel.call([form(4, 2), form(5, dtype=np.int32)], [form(3)], 2)
    call.send(*arrays)
    (result,) = call.receive()
    assert (result.shape, result.dtype) == ((3,), np.float32)
    for name, arguments in kernels.launches.items():
        assert "".join(map(_code, arguments)) == declared(name)
    sent, received = (kernels.launches[name] for name in ("send", "receive"))
    assert sent[:4] == (*arrays, None, None)
    assert sent[4:8] == (2, 2, 0, 0)
    assert [a.data.ptr for a in sent[8:10]] == [
        call.inputs[0].ctypes.data, channel.sent.ctypes.data
    ]  # fmt: skip
    assert sent[11:] == (0, None, 4)
    assert received[:8] == (result, None, None, None, 1, 0, 0, 0)
    assert received[8].data.ptr == call.results[0].ctypes.data
    assert received[11:] == (0, 2, None, 4)


def test_other_arrays_than_those_of_the_call_are_refused(channel: Any, kernels: Kernels) -> None:
    call = channel.call([form(4, 2)], [], 1)
    for arrays in ([], [late_cupy.empty((8,), np.float32)], [late_cupy.empty((4, 2), np.int32)]):
        with pytest.raises(ValueError, match="call 0 takes"):
            call.send(*arrays)
    assert not kernels.launches
