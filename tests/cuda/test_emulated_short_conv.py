"""ShortConv between its projections on the CPU, where CUDA threads take turns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.state import STEP_BACK, Room
from lfm2kit.testing.compare import assert_same
from lfm2kit.testing.sessions import Session, one_shot
from tests.cuda.emulated_operators import EmulatedConv, compiled

Float32 = npt.NDArray[np.float32]
HIDDEN_SIZE = 8


# Of the kernel, and how many rows a thread has.
SIZES = (3, 1), (3, 4), *(pytest.param((n, 4), marks=pytest.mark.long) for n in (1, 4))


@pytest.fixture(scope="module", params=SIZES, ids=str)
def conv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EmulatedConv:
    size, rows = request.param
    spec = specs.ShortConv(HIDDEN_SIZE, kernel_size=size)
    constants = {
        "ROWS": rows,
        "KERNEL_SIZE": spec.kernel_size,
        "WINDOW": spec.kernel_size - 1 + STEP_BACK,
    }
    folder = tmp_path_factory.mktemp("short_conv")
    program = compiled(folder, "blocks/short_conv", **constants, VECTOR=4, INNER="F32")
    taps = np.random.default_rng(5).standard_normal((spec.kernel_size, HIDDEN_SIZE))
    return EmulatedConv(program, spec, taps.astype(np.float32))


def rows(count: int, seed: int = 0) -> Float32:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3 * HIDDEN_SIZE)).astype(np.float32)


def session(conv: EmulatedConv, room: Room) -> Session:
    return Session(conv.spec, conv, np.random.default_rng(1), room)  # type: ignore[arg-type]


def whole(conv: EmulatedConv, bcx: Float32) -> Float32:
    got = one_shot(conv.spec, conv, bcx)  # type: ignore[arg-type]
    assert isinstance(got, np.ndarray)
    return got


def test_one_shot(conv: EmulatedConv) -> None:
    bcx, size = rows(23), conv.spec.kernel_size
    B, C, X = np.split(bcx.astype(np.float64), 3, axis=1)
    u = np.concatenate([np.zeros((size - 1, HIDDEN_SIZE)), B * X])
    want = C * sum(tap * u[j : j + 23] for j, tap in enumerate(conv.taps))
    np.testing.assert_allclose(whole(conv, bcx), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page_tokens", [64, 128])
def test_chunks_in_pages_have_the_bits_of_one_shot(conv: EmulatedConv, page_tokens: int) -> None:
    """Chunks end astride the ends of pages; one covers whole pages; another sequence is beside."""
    bcx, other = rows(340), rows(40, seed=1)
    fed = session(conv, Room(9, page_tokens))
    ends = (0, 1, 2, 5, 30, 62, 63, 64, 65, 66, 127, 130, 335, 336, 340)
    got = [
        fed.feed(("other", other[2 * i : 2 * i + 2]), ("one", bcx[a:b]))[1]
        for i, (a, b) in enumerate(pairwise(ends))
    ]
    assert_same(np.concatenate(got), whole(conv, bcx), "in chunks")


def test_a_used_page_begins_with_zeros(conv: EmulatedConv) -> None:
    fed = session(conv, Room(1, 64))
    fed.feed(("former", np.full_like(rows(64), np.nan)))
    fed.pages.drop("former")
    got = fed.feed_in_chunks("new", rows(6), [1, 1, 4])
    assert_same(got, whole(conv, rows(6)), "in a page of NaN")


@pytest.mark.parametrize(("fed", "back"), [(20, 1), (40, 16), (64, 16), (66, 9), (70, 6), (80, 16)])
def test_steps_back(conv: EmulatedConv, fed: int, back: int) -> None:
    bcx, other = rows(fed), rows(20, seed=1)
    for lengths in ([1] * 4, [20]):
        one = session(conv, Room(3, 64))
        one.feed(("one", bcx))
        one.pages.step_back("one", back)
        got = one.feed_in_chunks("one", other[: sum(lengths)], lengths)
        want = whole(conv, np.concatenate([bcx[: fed - back], other]))[fed - back :]
        assert_same(got, want[: sum(lengths)], f"{back} back from {fed}")


def test_forks_leave_the_shared_page_alone(conv: EmulatedConv) -> None:
    bcx, ends = rows(100), {"one": rows(5, seed=1), "fork": rows(5, seed=2)}
    fed = session(conv, Room(5, 64))
    fed.feed(("one", bcx))  # in one chunk, whose newest rows are not those of the first page
    shared = fed.pages.fork("fork", "one")
    for name, result in zip(ends, fed.feed(*ends.items()), strict=True):
        before = len(bcx) if name == "one" else shared
        want = whole(conv, np.concatenate([bcx[:before], ends[name]]))
        assert_same(result, want[before:], name)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 20, 1)])
def test_padding_rows_are_zeros_and_touch_no_page(
    conv: EmulatedConv, lengths: tuple[int, ...]
) -> None:
    state, padded_state = (conv.new_state(Room(3, 64)) for _ in range(2))
    ids = [np.zeros(n, np.int32) for n in lengths]
    batch = Batch.of_sequences(ids, pages=[[2], [0], [1]])
    padded, bcx = batch.padded(batch.tokens + 2), rows(batch.tokens + 2)
    want, got = conv(bcx[: batch.tokens], batch, state), conv(bcx, padded, padded_state)
    assert_same(got[: batch.tokens], want, "beside padding rows")
    assert not got[batch.tokens :].any()
    np.testing.assert_array_equal(padded_state.arrays[0], state.arrays[0])
