"""Where a call's arrays lie in the host's memory, and which threads copy them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
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

from lfm2kit.crossing import ArrayForm
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
    assert sending_grid(of_scores) == receiving_grid(of_scores, 1) == (1, 128)


# A channel, without the kernels.


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with late_cupy.loaded("memory", "channel") as (memory, module):
        monkeypatch.setattr(module, "load_kernel", lambda stem, name: (stem, name))
        yield memory.memory_of(1).channel(3, 5.0)


def form(*shape: int, dtype: type = np.float32) -> ArrayForm:
    return ArrayForm(shape, np.dtype(dtype))


def test_nothing_has_been_sent_at_first(channel: Any) -> None:
    assert channel.sent.shape == channel.failed.shape == (2,)
    assert channel.answered.shape == (3, 16)
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
