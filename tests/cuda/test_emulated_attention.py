"""Attention between its projections on the CPU, where CUDA threads take turns."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.parts import layout

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.state import Room
from lfm2kit.testing.compare import assert_same
from lfm2kit.testing.sessions import Session, one_shot
from tests.cuda.emulated_operators import (
    ATTENTION,
    EMULATED_PART,
    EmulatedAttention,
    Kept,
    compiled,
    inverse_frequencies,
    norm_weights,
)

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
WIDE = specs.Attention(320, 5, 1, 64, rope_theta=100.0, norm_eps=1e-5)  # read 16 bytes at once
ITEMSIZE, SHARED_BYTES = {"F32": 4, "BF16": 2}, 227 * 1024
CONTEXTS = (1, EMULATED_PART - 1, EMULATED_PART, EMULATED_PART + 1, 105)  # the last: of 4 parts


def attention_of(
    folder: Path, spec: specs.Attention, inner: str, part: int = EMULATED_PART, span: int = 8
) -> EmulatedAttention:
    """Return attention for parts of `part` keys, with spans of up to `span` tiles."""
    sizes = {
        "HEADS": spec.num_attention_heads, "KV_HEADS": spec.num_key_value_heads,
        "HEAD_DIM": spec.head_dim, "INNER": inner, "PART_KEYS": part,
    }  # fmt: skip
    chip = layout(spec, ITEMSIZE[inner], SHARED_BYTES)._replace(SPAN_TILES=span)._asdict()
    return EmulatedAttention(compiled(folder, "blocks/attention", **sizes, **chip), spec)


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> EmulatedAttention:
    return attention_of(tmp_path_factory.mktemp("attention"), ATTENTION, "F32")


@pytest.fixture(scope="module", params=["small heads", "BF16"])
def of_parts(
    request: pytest.FixtureRequest,
    attention: EmulatedAttention,
    tmp_path_factory: pytest.TempPathFactory,
) -> EmulatedAttention:
    """Return attention with heads that are read word by word, or 16 bytes at once."""
    if request.param == "small heads":
        return attention
    return attention_of(tmp_path_factory.mktemp("attention-wide"), WIDE, request.param, 128, 2)


def rows(count: int, seed: int = 0, spec: specs.Attention = ATTENTION) -> Float32:
    rng, heads = (
        np.random.default_rng(seed),
        spec.num_attention_heads + 2 * spec.num_key_value_heads,
    )
    return rng.standard_normal((count, heads * spec.head_dim)).astype(np.float32)


def rotated(heads: Float64, weight: Float32, spec: specs.Attention) -> Float64:
    """Return the heads of one sequence, [tokens, heads, head_dim], normed and rotated."""
    size = np.sqrt((heads**2).mean(axis=2, keepdims=True) + spec.norm_eps)
    a, b = np.split(heads / size * weight, 2, axis=2)
    angles = np.arange(len(heads))[:, None, None] * inverse_frequencies(spec)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def expected(qkv: Float32, spec: specs.Attention = ATTENTION) -> Float32:
    """Return a sequence's heads, row by row, each of the keys and values up to itself alone."""
    queries, keys = (
        n * spec.head_dim for n in (spec.num_attention_heads, spec.num_key_value_heads)
    )
    q, k, v = (
        part.reshape(len(qkv), -1, spec.head_dim)
        for part in np.split(qkv.astype(np.float64), [queries, queries + keys], axis=1)
    )
    q, k = (rotated(x, w, spec) for x, w in zip((q, k), norm_weights(spec), strict=True))
    heads, group = np.empty_like(q), spec.num_attention_heads // spec.num_key_value_heads
    for row in range(len(q)):
        for head in range(spec.num_attention_heads):
            scores = k[: row + 1, head // group] @ q[row, head] * spec.head_dim**-0.5
            weights = np.exp(scores - scores.max())
            heads[row, head] = weights / weights.sum() @ v[: row + 1, head // group]
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


def test_ctas_that_share_the_parts_of_a_row_have_the_bits_of_a_prompt(
    of_parts: EmulatedAttention,
) -> None:
    """The newest rows of several sequences, and of one; the table has columns to spare."""
    qkvs = [rows(n, n, of_parts.spec) for n in CONTEXTS]
    want = [one_shot(of_parts.spec, of_parts, qkv)[-1] for qkv in qkvs]  # type: ignore[arg-type]
    state, pages = filled(of_parts, [qkv[:-1] for qkv in qkvs])
    for ctas in (1, 3):
        shared, ids = replace(of_parts, ctas=ctas), np.zeros(1, np.int32)
        for some in (slice(None), slice(-1, None)):
            starts = [len(qkv) - 1 for qkv in qkvs[some]]
            batch = Batch.of_sequences([ids] * len(starts), starts=starts, pages=pages[some])
            got = shared(np.stack([qkv[-1] for qkv in qkvs[some]]), batch, deepcopy(state))
            assert_same(got, np.stack(want[some]), f"{ctas} CTAs, {len(starts)} sequences")


def test_more_parts_than_a_warp_has_lanes(attention: EmulatedAttention) -> None:
    assert_steps_have_the_bits_of_one_cta(attention, [67 * EMULATED_PART + 1], [3])


def test_parts_end_anywhere_in_a_span(of_parts: EmulatedAttention) -> None:
    """The wide heads have parts of two spans, and warps with two heads or one."""
    contexts = [1, 31, 33, 64, 65, 97, 127, 128, 129, 3 * 128 + 45]
    assert_steps_have_the_bits_of_one_cta(of_parts, contexts, [1, 3])


@pytest.mark.long
@pytest.mark.parametrize(
    ("heads", "part", "span"), [(1, 64, 8), (3, 128, 2), (4, 256, 8), (5, 64, 1), (8, 128, 4)]
)
def test_warps_share_any_number_of_heads(tmp_path: Path, heads: int, part: int, span: int) -> None:
    spec = specs.Attention(12, heads, 1, 4, rope_theta=100.0, norm_eps=1e-5)
    contexts = [1, 31, part - 1, part, part + 1, 3 * part + 45]
    team = attention_of(tmp_path, spec, "F32", part, span)
    assert_steps_have_the_bits_of_one_cta(team, contexts, [1, 3])


def assert_steps_have_the_bits_of_one_cta(
    attention: EmulatedAttention, contexts: list[int], numbers_of_ctas: list[int]
) -> None:
    """Compare rows that follow any numbers that BF16 has: no prompt has made what is kept."""
    count, width, rng = len(contexts), max(contexts) // 64 + 1, np.random.default_rng(3)
    state = attention.new_state(Room(count * width, 64))
    state.arrays = [
        rng.integers(-128, 129, array.shape).astype(np.float32) / 64 for array in state.arrays
    ]
    batch = Batch.of_sequences(
        [np.zeros(1, np.int32)] * count,
        starts=[context - 1 for context in contexts],
        pages=np.arange(count * width, dtype=np.int32).reshape(count, width),
    )
    new = rows(count, spec=attention.spec)
    want, *got = (
        replace(attention, ctas=ctas)(new, batch, deepcopy(state)) for ctas in (0, *numbers_of_ctas)
    )
    assert np.isfinite(want).all()
    for ctas, result in zip(numbers_of_ctas, got, strict=True):
        assert_same(result, want, f"{ctas} CTAs")


def test_several_new_rows_have_the_bits_of_a_prompt(attention: EmulatedAttention) -> None:
    """As when guesses are checked: each row has its own parts, and the first ones have fewer."""
    qkv, start = rows(2 * EMULATED_PART + 2), 2 * EMULATED_PART - 3
    state, pages = filled(attention, [qkv[:start]])
    new = np.zeros(len(qkv) - start, np.int32)
    batch = Batch.of_sequences([new], starts=[start], pages=pages)
    got = replace(attention, ctas=2)(qkv[start:], batch, state)
    assert_same(got, whole(attention, qkv)[start:], "rows of one sequence")


def test_parts_are_added_to_what_attention_is(of_parts: EmulatedAttention) -> None:
    spec = of_parts.spec
    qkv = rows(2 * EMULATED_PART + 5, 1, spec)
    error, scale = (0.02, 0.02) if spec is WIDE else (1e-4, 1e-6)
    got = one_shot(spec, of_parts, qkv)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, expected(qkv, spec), rtol=error, atol=scale)


@pytest.mark.parametrize("ctas", [0, 1, 3])
def test_padding_rows_are_zeros_and_touch_no_page(attention: EmulatedAttention, ctas: int) -> None:
    qkvs = [rows(n, n) for n in CONTEXTS]
    state, pages = filled(attention, [qkv[:-1] for qkv in qkvs])
    attention = replace(attention, ctas=ctas)
    starts = [len(qkv) - 1 for qkv in qkvs]
    step = Batch.of_sequences([np.zeros(1, np.int32)] * len(qkvs), starts=starts, pages=pages)
    new = np.concatenate([*(qkv[-1:] for qkv in qkvs), rows(3)])
    padded_state = deepcopy(state)
    want = attention(new[: step.tokens], step, state)
    got = attention(new, step.padded(len(new)), padded_state)
    assert_same(got[: step.tokens], want, "beside padding rows")
    assert not got[step.tokens :].any()
    for array, wanted in zip(padded_state.arrays, state.arrays, strict=True):
        np.testing.assert_array_equal(array, wanted)


def filled(
    attention: EmulatedAttention, qkvs: list[Float32], wider: int = 3
) -> tuple[Kept, npt.NDArray[np.int32]]:
    """Return a state with these sequences, and its pages in a table with columns to spare."""
    count = -(-(max(map(len, qkvs)) + 8) // 64)
    state = attention.new_state(Room(len(qkvs) * count + 1, 64))
    numbers = np.random.default_rng(2).permutation(len(qkvs) * count).reshape(-1, count)
    table = np.full((len(qkvs), count + wider), -1, np.int32)
    table[:, :count] = numbers
    ids = [np.zeros(len(qkv), np.int32) for qkv in qkvs]
    for qkv, tokens, row in zip(qkvs, ids, table, strict=True):
        if len(qkv):
            attention(qkv, Batch.of_sequences([tokens], pages=row[None]), state)
    return state, table


def session(attention: EmulatedAttention, room: Room) -> Session:
    return Session(ATTENTION, attention, np.random.default_rng(1), room)  # type: ignore[arg-type]


def whole(attention: EmulatedAttention, qkv: Float32) -> Float32:
    got = one_shot(ATTENTION, attention, qkv)  # type: ignore[arg-type]
    assert isinstance(got, np.ndarray)
    return got
