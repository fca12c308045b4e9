"""Attention of few rows over long contexts, at the size of LFM2-8B-A1B, on a real GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit import specs
from lfm2kit.backend import Context, Room, Weights
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.testing.compare import assert_close, assert_same
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_weights import random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

SPEC = specs.Attention(2048, 32, 8, 64, 1e6, 1e-5)
CONTEXTS = (255, 256, 257, 2047, 2048, 2049, 8191, 8192, 8193, 32768)
LONGEST, BESIDE = CONTEXTS[-1], 100  # tokens of the sequence, and of a short one beside it
PAGE_TOKENS, SPARE = 128, 9


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(SPEC)


@pytest.fixture(scope="module")
def x() -> Float32:
    return np.random.default_rng(0).standard_normal((LONGEST, SPEC.hidden_size), np.float32)


@pytest.fixture(scope="module")
def expected(weights: Weights, x: Float32) -> Float64:
    """Return the rows that end these contexts, in float64."""
    q, k, v = (x.astype(np.float64) @ _matrix(weights, f"{n}_proj") for n in "qkv")
    places, group = np.array(CONTEXTS) - 1, SPEC.num_attention_heads // SPEC.num_key_value_heads
    q = _rotated(q[places], weights.float32("q_layernorm.weight"), places)
    k = _rotated(k, weights.float32("k_layernorm.weight"), np.arange(LONGEST))
    v, heads = v.reshape(LONGEST, -1, SPEC.head_dim), np.empty_like(q)
    for i, head in np.ndindex(heads.shape[:2]):
        scores = k[: CONTEXTS[i], head // group] @ q[i, head] * SPEC.head_dim**-0.5
        shares = np.exp(scores - scores.max())
        heads[i, head] = shares / shares.sum() @ v[: CONTEXTS[i], head // group]
    return heads.reshape(len(CONTEXTS), -1) @ _matrix(weights, "out_proj")


def _matrix(weights: Weights, name: str) -> Float64:
    return weights.float32(f"{name}.weight").T.astype(np.float64)


def _rotated(rows: Float64, weight: Float32, positions: npt.NDArray[np.int64]) -> Float64:
    heads = rows.reshape(len(rows), -1, SPEC.head_dim)
    size = np.sqrt((heads**2).mean(axis=2, keepdims=True) + SPEC.norm_eps)
    a, b = np.split(heads / size * weight, 2, axis=2)
    exponents = np.arange(0, SPEC.head_dim, 2, dtype=np.float32) / np.float32(SPEC.head_dim)
    inverse = (1 / np.float32(SPEC.rope_theta) ** exponents).astype(np.float32)
    angles = (positions[:, None].astype(np.float32) * inverse)[:, None].astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


class Decoding:
    """A sequence and a short one in a state whose memory holds NaN where nothing was written."""

    def __init__(self, block: HostBlock, x: Float32) -> None:
        self.block, self.x = block, x
        width = LONGEST // PAGE_TOKENS
        self.state = block.new_state(Room(width + SPARE, PAGE_TOKENS))
        for array in self.state[:3]:
            array.view(np.uint8).fill(0xFF)
        numbers = np.random.default_rng(1).permutation(width + 1).astype(np.int32)
        self.pages, self.page_beside = numbers[:width], numbers[width]
        self.feed(0, BESIDE, is_beside=True)

    def feed(self, start: int, end: int, *, is_beside: bool = False, spare: int = 0) -> Float32:
        """Return the rows from `start` to `end` of one sequence; the table has columns to spare."""
        pages = [[self.page_beside]] if is_beside else [self.pages[: -(-end // PAGE_TOKENS)]]
        table = np.pad(np.array(pages, np.int32), ((0, 0), (0, spare)), constant_values=-1)
        batch = Batch.of_sequences([np.zeros(end - start, np.int32)], starts=[start], pages=table)
        return np.asarray(self.block(self.x[start:end], batch, self.state))

    def beside(self, at: int) -> Float32:
        """Return row `at`, computed in a batch with the short sequence before it."""
        table = np.full((2, -(-(at + 1) // PAGE_TOKENS)), -1, np.int32)
        table[0, 0], table[1] = self.page_beside, self.pages[: table.shape[1]]
        ids, starts = [np.zeros(1, np.int32)] * 2, [BESIDE - 1, at]
        batch = Batch.of_sequences(ids, starts=starts, pages=table)
        return np.asarray(self.block(self.x[[BESIDE - 1, at]], batch, self.state))[1:]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_token_has_the_bits_of_a_prompt_whatever_its_context(
    precision: str, weights: Weights, x: Float32, expected: Float64
) -> None:
    """Alone, in a table that is too wide, in a batch, among other new rows, and in one prompt."""
    plugins = installed_plugins()
    backend: Any = plugins.creator(Context(precision=precision))("cuda")
    block = HostBlock(SPEC, backend.build(SPEC, weights), backend.memory(SPEC))
    prompt = block(x, Batch.of_sequences([np.zeros(LONGEST, np.int32)]), None)
    places = np.array(CONTEXTS) - 1
    error = plugins.precision("cuda", precision).grade.block_error
    for i, at in enumerate(places):
        assert_close(prompt[at], expected[i], error, f"context {at + 1}, {precision}")
    decoding, start = Decoding(block, x), 0
    for at in places:
        if start < at:
            assert_same(decoding.feed(start, at), prompt[start:at], f"a chunk before {at}")
        for spare in (0, 300):
            got = decoding.feed(at, at + 1, spare=spare)
            assert_same(got, prompt[at : at + 1], f"row {at}, {spare} columns to spare")
        assert_same(decoding.beside(at), prompt[at : at + 1], f"row {at} in a batch")
        several = decoding.feed(at - 5, at + 1)
        assert_same(several, prompt[at - 5 : at + 1], f"row {at} after five new ones")
        start = at + 1
    assert not decoding.state.arrived.any()
