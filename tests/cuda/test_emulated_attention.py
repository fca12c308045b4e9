"""Attention between its projections on the CPU, where CUDA threads take turns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from lfm2kit.batch import Batch
from lfm2kit.state import Room
from lfm2kit.testing.compare import assert_same
from lfm2kit.testing.sessions import Session, one_shot
from tests.cuda.emulated_operators import ATTENTION, INVERSE, WEIGHTS, EmulatedAttention, compiled

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
GROUP, QUERIES, KEYS = HEADS // KV_HEADS, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> EmulatedAttention:
    sizes = {"HEADS": HEADS, "KV_HEADS": KV_HEADS, "HEAD_DIM": HEAD_DIM, "INNER": "F32"}
    program = compiled(tmp_path_factory.mktemp("attention"), "blocks/attention", **sizes)
    return EmulatedAttention(program)


def rows(count: int, seed: int = 0) -> Float32:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, QUERIES + 2 * KEYS)).astype(np.float32)


def rotated(heads: Float64, weight: Float32) -> Float64:
    """Return the heads of one sequence, [tokens, heads, HEAD_DIM], normed and rotated."""
    size = np.sqrt((heads**2).mean(axis=2, keepdims=True) + ATTENTION.norm_eps)
    a, b = np.split(heads / size * weight, 2, axis=2)
    angles = np.arange(len(heads))[:, None, None] * INVERSE
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def expected(qkv: Float32) -> Float32:
    """Return a sequence's heads, row by row, each of the keys and values up to itself alone."""
    q, k, v = (
        part.reshape(len(qkv), -1, HEAD_DIM)
        for part in np.split(qkv.astype(np.float64), [QUERIES, QUERIES + KEYS], axis=1)
    )
    q, k = rotated(q, WEIGHTS[0]), rotated(k, WEIGHTS[1])
    heads = np.empty_like(q)
    for row in range(len(q)):
        for head in range(HEADS):
            scores = k[: row + 1, head // GROUP] @ q[row, head] * HEAD_DIM**-0.5
            weights = np.exp(scores - scores.max())
            heads[row, head] = weights / weights.sum() @ v[: row + 1, head // GROUP]
    return heads.reshape(len(qkv), -1).astype(np.float32)


def test_rows_see_what_is_before_them_and_nothing_else(attention: EmulatedAttention) -> None:
    """Values that are not finite, at several places of tiles of 32 keys, spoil no row before."""
    lengths = [37, 1, 40]
    batch, qkv = Batch.of_sequences([np.zeros(n, np.int32) for n in lengths]), rows(sum(lengths))
    clean = attention(qkv, batch, None)
    for a, b in pairwise(batch.cu_seqlens):
        np.testing.assert_allclose(clean[a:b], expected(qkv[a:b]), rtol=1e-4, atol=1e-6)
    sequence, places = np.repeat(np.arange(3), lengths), np.arange(len(qkv))
    for spoilt_rows in ({35: np.nan, 38 + 31: np.inf}, {38 + 36: np.nan}):
        spoilt, is_after = qkv.copy(), np.zeros(len(qkv), np.bool_)
        for row, value in spoilt_rows.items():
            spoilt[row] = value
            is_after |= (places >= row) & (sequence == sequence[row])
        got = attention(spoilt, batch, None)
        assert not np.isfinite(got[is_after]).any()
        assert np.array_equal(got[~is_after], clean[~is_after])


def test_chunks_in_pages_have_the_bits_of_one_shot(attention: EmulatedAttention) -> None:
    """Chunks end astride the ends of pages and of tiles; another sequence is fed beside."""
    qkv, other = rows(97), rows(5, seed=1)
    fed, ends = session(attention, Room(5, 64)), (0, 31, 63, 64, 65, 97)
    got = [
        fed.feed(("one", qkv[a:b]), ("other", other[i : i + 1]))[0]
        for i, (a, b) in enumerate(pairwise(ends))
    ]
    assert_same(np.concatenate(got), whole(attention, qkv), "in pages of 64 tokens")


def test_forks_leave_the_shared_page_alone(attention: EmulatedAttention) -> None:
    qkv, ends = rows(67), {"one": rows(3, seed=1), "fork": rows(2, seed=2)}
    fed = session(attention, Room(3, 64))
    fed.feed(("one", qkv))
    shared = fed.pages.fork("fork", "one")
    for name, result in zip(ends, fed.feed(*ends.items()), strict=True):
        before = len(qkv) if name == "one" else shared
        want = whole(attention, np.concatenate([qkv[:before], ends[name]]))
        assert_same(result, want[before:], name)


def test_steps_back_across_a_page(attention: EmulatedAttention) -> None:
    qkv, other = rows(67), rows(5, seed=1)
    fed = session(attention, Room(2, 64))
    fed.feed(("one", qkv))
    fed.pages.step_back("one", 5)
    want = whole(attention, np.concatenate([qkv[:62], other]))
    assert_same(fed.feed_in_chunks("one", other, [1, 4]), want[62:], "after a step back")


def session(attention: EmulatedAttention, room: Room) -> Session:
    return Session(ATTENTION, attention, np.random.default_rng(1), room)  # type: ignore[arg-type]


def whole(attention: EmulatedAttention, qkv: Float32) -> Float32:
    got = one_shot(ATTENTION, attention, qkv)  # type: ignore[arg-type]
    assert isinstance(got, np.ndarray)
    return got
