"""Draws the tokens of rows of logits, all in one call of a kernel.

It does what `lfm2kit.engine.drawing` does in NumPy (decision 0035), and draws the same tokens.
Sums of floats may differ in their last bits; the weights of a draw are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit.engine.asked import RECORD, asked_by
from lfm2kit.engine.drawing import ALL_EXCLUDED, NOT_FINITE, WHOLE, Drawn, NotANumber, Row
from lfm2kit.engine.filters import GROUP
from lfm2kit.engine.logprobs import logprobs
from lfm2kit.engine.sampling import LARGEST as LARGEST_LOGIT
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.random_bits import bits_of_draw
from lfm2kit_cpu_simd.selecting import border_of_top_p, exp, kth_largest
from lfm2kit_cpu_simd.signatures import IDS, INDICES_OUT, ROWS, VECTOR

LARGEST = np.float32(LARGEST_LOGIT)
WHY = {-1: NOT_FINITE, -2: ALL_EXCLUDED}  # what a kernel returns instead of an id
INFINITE = np.float32(np.inf)
NO, YES = np.int32(0), np.int32(1)  # loops that collect them become vector code
BLOCK = 64  # logits that are compared at once
HALF, LOW = np.uint64(32), np.uint64(2**32 - 1)

Float32 = npt.NDArray[np.float32]


class Sampler:
    """A sampler for one thread at a time, which works again in the same arrays."""

    def __init__(self) -> None:
        self._scratch = Scratch(0)

    def draw(self, logits: Float32, rows: Sequence[Row | None]) -> list[Drawn | NotANumber | None]:
        if len(logits) != len(rows):  # the kernel does not look where the logits end
            raise ValueError(f"{len(rows)} rows for {len(logits)} rows of logits")
        if self._scratch.vocab_size != logits.shape[1]:
            self._scratch = Scratch(logits.shape[1])
        token_ids = np.empty(len(rows), np.int64)
        contiguous = np.ascontiguousarray(logits)
        _draw_all(contiguous, *asked_by(rows), self._scratch.arrays, token_ids)
        return [
            row and _drawn(logits, place, token_id, row)
            for place, (token_id, row) in enumerate(zip(token_ids.tolist(), rows, strict=True))
        ]


def _drawn(logits: Float32, place: int, token_id: int, row: Row) -> Drawn | NotANumber:
    if token_id < 0:
        return NotANumber(row.position, WHY[token_id])
    if row.logprobs is None:
        return Drawn(token_id)
    return Drawn(token_id, *logprobs(logits[place], token_id, row.logprobs))


class Scratch:
    """The arrays of a kernel for one row."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.arrays = (
            np.empty(vocab_size, np.float32),  # the logits, changed
            np.zeros(vocab_size, np.int32),  # counts of ids, all 0 between calls
            np.empty(vocab_size, np.int32),  # ids that are kept
            np.empty((2, vocab_size), np.float32),  # their scores, and a copy
            np.empty(vocab_size, np.float32),  # their shares of the probability
            np.empty(vocab_size, np.float64),  # their weights
        )


@numba.njit(inline="always")
def _rank(value: Any) -> Any:
    """Return an int32 that is larger for a larger float32: loops over it become vector code."""
    bits = np.float32(value).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@numba.njit(inline="always")
def _largest(logits: Any) -> Any:
    """Return the largest number; none is NaN."""
    best = _rank(-INFINITE)
    for i in range(len(logits)):
        rank = _rank(logits[i])
        best = rank if rank > best else best
    return np.int32(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@numba.njit(inline="always")
def _copy(logits: Any, changed: Any) -> Any:
    """Copy a row; return whether none of it is NaN or above `LARGEST`."""
    bad = NO
    for i in range(len(logits)):
        changed[i] = logits[i]
        bad |= NO if logits[i] <= LARGEST else YES
    return bad == NO


@numba.njit
def _penalise(logits: Any, changed: Any, counts: Any, row: Any, ids: Any, biases: Any) -> None:
    prompt_and_generated = ids[: row.prompt + row.generated]
    generated = prompt_and_generated[row.prompt :]
    repetition = np.float32(row.repetition_penalty)
    presence, frequency = np.float32(row.presence_penalty), np.float32(row.frequency_penalty)
    if repetition != 1:
        for i in prompt_and_generated:
            changed[i] = logits[i] * repetition if logits[i] < 0 else logits[i] / repetition
    if presence != 0 or frequency != 0:
        for i in generated:
            counts[i] += 1
        for i in generated:
            if counts[i] > 0:
                changed[i] -= frequency * np.float32(counts[i]) + presence
                counts[i] = 0
    with_bias = ids[len(ids) - row.biases :]
    for i in range(row.biases):
        changed[with_bias[i]] += biases[i]


@numba.njit
def _exclude(changed: Any, row: Any, ids: Any, words: Any) -> None:
    if row.is_masked:
        for i in range(len(changed)):
            word = words[i // 32] if i // 32 < row.words else np.uint32(0)
            if word >> np.uint32(i % 32) & np.uint32(1) == 0:
                changed[i] = -INFINITE
    seen = row.prompt + row.generated
    for i in ids[seen : seen + row.forbidden]:
        changed[i] = -INFINITE


@numba.njit(inline="always")
def _least(changed: Any, best: Any, row: Any, groups: Any) -> Any:
    """Return a logit such that all lower ones are surely removed."""
    least = -np.float64(LARGEST)
    if 0 < row.top_k * GROUP <= len(changed):
        least = max(least, _below(np.float64(_least_of_top_k(changed, row.top_k, groups))))
    if row.min_p > 0 and row.top_p == 1:
        border = best + math.log(row.min_p) * row.temperature
        least = max(least, _below(border) - 1e-3 * row.temperature)
    return np.float32(least)


@numba.njit(inline="always")
def _below(border: float) -> float:
    """Return a logit whose score, rounded to float32, is below that of `border`."""
    return border - 1e-6 * abs(border)


@numba.njit
def _least_of_top_k(changed: Any, k: int, groups: Any) -> Any:
    """Return the k-th largest of groups' largest logits: at least k logits are as large."""
    count = len(changed) // GROUP
    for i in range(count):
        groups[i] = changed[i]
    for start in range(count, count * GROUP, count):
        for i in range(count):
            groups[i] = groups[i] if groups[i] > changed[start + i] else changed[start + i]
    return kth_largest(groups[:count], k)


@numba.njit(inline="always")
def _take(
    changed: Any, block: Any, least: Any, temperature: Any, ids: Any, scores: Any, count: int
) -> int:
    for i in block:
        if changed[i] >= least:
            ids[count], scores[count] = i, changed[i] / temperature
            count += 1
    return count


@numba.njit
def _candidates(changed: Any, least: Any, temperature: Any, ids: Any, scores: Any) -> Any:
    """Write the ids and scores of logits from `least` on; return how many there are."""
    count, whole = 0, len(changed) // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        there = NO
        for i in range(BLOCK):
            there |= YES if changed[start + i] >= least else NO
        if there == YES:
            block = range(start, start + BLOCK)
            count = _take(changed, block, least, temperature, ids, scores, count)
    return _take(changed, range(whole, len(changed)), least, temperature, ids, scores, count)


@numba.njit
def _keep(ids: Any, scores: Any, border: Any, removed: int) -> Any:
    """Keep scores above `border`, and all that equal it but the last `removed`; return how many."""
    equal, count = -removed, 0
    for score in scores:
        equal += score == border
    for i in range(len(scores)):
        score = scores[i]
        if score > border or (score == border and equal > 0):
            equal -= score == border
            ids[count], scores[count] = ids[i], score
            count += 1
    return count


@numba.njit
def _weigh(scores: Any, weights: Any) -> Any:
    """Write the weights of scores, in proportion to the best one's; return their sum."""
    best, total = np.float64(_largest(scores)), 0.0
    for i in range(len(scores)):
        weights[i] = exp(np.float64(scores[i]) - best)
    for i in range(len(scores)):
        total += weights[i]
    return total


@numba.njit
def _top_p(ids: Any, scores: Any, copy: Any, shares: Any, weights: Any, top_p: float) -> Any:
    total, rest = _weigh(scores, weights), 1 - top_p
    sure = 0.5 * rest / len(scores)  # all smaller shares are removed
    below, count = 0.0, 0
    for i in range(len(scores)):
        share = np.float32(weights[i] / total)
        if share < sure:
            below += np.float64(share)
        else:
            copy[count], shares[count] = scores[i], share
            count += 1
    border, removed = border_of_top_p(copy[:count], shares[:count], below, np.float32(rest))
    return _keep(ids, scores, border, removed)


@numba.njit
def _high(a: Any, b: Any) -> Any:
    """Return the upper 64 bits of the product of two numbers of 64 bits."""
    low = (a & LOW) * (b & LOW) >> HALF
    middle = (a >> HALF) * (b & LOW) + low
    other = (a & LOW) * (b >> HALF) + (middle & LOW)
    return (a >> HALF) * (b >> HALF) + (middle >> HALF) + (other >> HALF)


@numba.njit
def _chosen(ids: Any, weights: Any, bits: Any) -> Any:
    """Return the id at which the cumulative whole weight passes a random one."""
    total = np.uint64(0)
    for weight in weights:
        total += np.uint64(np.rint(weight * WHOLE))
    passed, end = _high(bits, total), np.uint64(0)
    for i in range(len(ids)):
        end += np.uint64(np.rint(weights[i] * WHOLE))
        if end > passed:
            return ids[i]
    return ids[-1]


@numba.njit
def _draw(logits: Any, row: Any, ids: Any, biases: Any, words: Any, scratch: Any) -> Any:
    """Return the id that a row draws, or a key of `WHY`."""
    changed, counts, kept, scores, shares, weights = scratch
    if not _copy(logits, changed):
        return -1
    _penalise(logits, changed, counts, row, ids, biases)
    _exclude(changed, row, ids, words)
    best = _largest(changed)
    if best < -LARGEST:
        return -2
    if row.temperature == 0:
        first = 0
        while changed[first] != best:
            first += 1
        return first
    least = _least(changed, np.float64(best), row, scores[1])
    count = _candidates(changed, least, np.float32(row.temperature), kept, scores[0])
    if 0 < row.top_k < count:
        scores[1, :count] = scores[0, :count]
        border = kth_largest(scores[1, :count], row.top_k)
        count = _keep(kept, scores[0, :count], border, 0)
    if row.top_p < 1:
        count = _top_p(kept, scores[0, :count], scores[1], shares, weights, row.top_p)
    _weigh(scores[0, :count], weights)
    if row.min_p > 0:
        likely = 0
        for i in range(count):
            if weights[i] >= row.min_p:
                kept[likely], weights[likely] = kept[i], weights[i]
                likely += 1
        count = likely
    return _chosen(kept[:count], weights[:count], bits_of_draw(row.seed, row.position))


_FLOATS = types.float32[::1]


@kernel(
    types.void(
        ROWS,
        types.Array(numba.from_dtype(RECORD), 1, "C", readonly=True),
        IDS,
        VECTOR,
        types.Array(types.uint32, 1, "C", readonly=True),
        types.Tuple(
            [
                _FLOATS,
                types.int32[::1],
                types.int32[::1],
                types.float32[:, ::1],
                _FLOATS,
                types.float64[::1],
            ]
        ),
        INDICES_OUT,
    )
)
def _draw_all(
    logits: Any,
    records: Any,
    ids: Any,
    biases: Any,
    words: Any,
    scratch: Any,
    token_ids: Any,
) -> None:
    """Write the id that each row draws, or a key of `WHY`; see `lfm2kit.engine.asked`."""
    for i in range(len(records)):
        row = records[i]
        last_id = row.first_id + row.prompt + row.generated + row.forbidden + row.biases
        own = ids[row.first_id : last_id]
        own_biases, own_words = biases[row.first_bias :], words[row.first_word :]
        token_ids[row.row] = _draw(logits[row.row], row, own, own_biases, own_words, scratch)
