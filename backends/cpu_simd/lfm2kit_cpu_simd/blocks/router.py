"""The router and its parts: scores by the SIMD tile, the choice by lanes; always in float32."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Format, NativeCall, Weights
from lfm2kit_cpu_simd.chooser import address_of_chooser, call_chooser, prefetch
from lfm2kit_cpu_simd.compiling import c_function, kernel
from lfm2kit_cpu_simd.crew import CREW
from lfm2kit_cpu_simd.gemm import Float32, linear
from lfm2kit_cpu_simd.machine import VL
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.signatures import BOOL, FLOAT, IDS_OUT, INT, ROWS, ROWS_OUT, VECTOR
from lfm2kit_cpu_simd.tile import CACHE_LINE

Int32 = npt.NDArray[np.int32]

LANES = 32  # a row's keys are padded to a multiple: vectors of any CPU, and some of them at once
LEAST, MOST = np.int64(-(2**63)), np.int64(2**63 - 1)  # below and above the keys of all experts
LAST_ID = np.int64(2**31 - 1)


class Scores:
    def __init__(self, spec: specs.Scores, weights: Weights, format: Format | None) -> None:
        self.num_experts = spec.num_experts
        self.gate = pack([[weights["gate.weight"]]])

    def __call__(self, x: Float32) -> Float32:
        scores = self.logits(x)
        _score(scores)
        return scores

    def logits(self, x: Float32) -> Float32:
        return linear(x, self.gate, self.num_experts)


class Choice:
    def __init__(self, spec: specs.Choice, weights: Weights, format: Format | None) -> None:
        self.num_experts, self.taken = spec.num_experts, spec.num_experts_per_tok
        self.bias = np.zeros(spec.num_experts, np.float32)
        if spec.use_expert_bias:
            self.bias += weights.float32("expert_bias")  # 0 + -0 is 0: no sum with it is -0
        self.normalise = spec.norm_topk_prob
        self.scaling = np.float32(spec.routed_scaling_factor)
        self.chooser = address_of_chooser(self.taken)

    def __call__(self, scores: Float32) -> tuple[Int32, Float32]:
        expert_ids, expert_weights = self.room(scores)
        how = self.bias, self.normalise, self.scaling
        _choose(scores, *how, expert_ids, expert_weights, self.chooser, CREW.size())
        return expert_ids, expert_weights

    def room(self, rows: Float32) -> tuple[Int32, Float32]:
        """Return arrays for what is chosen for rows of scores or logits."""
        shape = (len(rows), self.taken)
        return np.empty(shape, np.int32), np.empty(shape, np.float32)

    def native(self) -> NativeCall:
        """Return the choice as machine code; see `_choose_natively` for its argument."""
        sizes = np.array([self.num_experts, self.taken, self.normalise, self.chooser], np.int64)
        numbers = np.array([self.scaling, *self.bias], np.float32)
        argument = np.array([sizes.ctypes.data, numbers.ctypes.data], np.uintp)
        owner = (_choose_natively, argument, sizes, numbers)
        return NativeCall(_choose_natively.address, argument.ctypes.data, owner)


class Router:
    """A router that chooses from logits in one kernel, so that scores need no array of all rows."""

    def __init__(self, spec: specs.Router, weights: Weights, format: Format | None) -> None:
        self.scores = Scores(spec.scores, weights, format)
        self.choice = Choice(spec.choice, weights, format)

    def __call__(self, x: Float32) -> tuple[Int32, Float32]:
        choice, logits = self.choice, self.scores.logits(x)
        expert_ids, expert_weights = choice.room(logits)
        how = choice.bias, choice.normalise, choice.scaling
        _choose_of_logits(logits, *how, expert_ids, expert_weights, CREW.size())
        return expert_ids, expert_weights


@numba.njit(inline="always")
def _sigmoid(logit: Any) -> Any:
    """Return the sigmoid, computed in float64 and rounded once.

    It is exactly 1 or 0 where float32 has nothing between.
    """
    return np.float32(1.0 / (1.0 + math.exp(-np.float64(logit))))


@numba.njit(inline="always")
def _key(biased: Any, expert: Any) -> Any:
    """Return an int64 that is larger for a larger float32, and among equal ones for a lower id."""
    bits = np.float32(biased).view(np.int32)
    rank = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return (np.int64(rank) << np.int64(32)) | (LAST_ID - expert)


@numba.njit(inline="always")
def _choose_of_row(
    scores: Any,
    bias: Any,
    keys: Any,
    normalise: Any,
    scaling: Any,
    expert_ids: Any,
    expert_weights: Any,
) -> None:
    """Choose the experts of a row; the bias selects them and does not weigh them.

    Where a score is NaN the bias selects alone, and the weights are NaN.  `keys`, from
    `_room_for_keys`, is overwritten.  Each loop over experts becomes vector code.
    """
    is_nan = False
    for e in range(scores.shape[0]):
        is_nan |= math.isnan(scores[e])
        keys[e] = _key(scores[e] + bias[e], e)
    if is_nan:
        for e in range(scores.shape[0]):
            keys[e] = _key(bias[e], e)
    total, best = np.float32(0), MOST
    for k in range(expert_ids.shape[0]):
        last, best = best, LEAST
        for e in range(keys.shape[0] // LANES * LANES):
            best = max(best, keys[e] if keys[e] < last else LEAST)
        expert = LAST_ID - (best & LAST_ID)
        expert_ids[k] = expert
        expert_weights[k] = scores[expert]
        total += scores[expert]
    for k in range(expert_ids.shape[0]):
        weight = expert_weights[k]
        if normalise:
            weight = weight / (total + np.float32(1e-6))
        expert_weights[k] = np.float32(np.nan) if is_nan else weight * scaling


@numba.njit(inline="always")
def _room_for_keys(num_experts: Any) -> Any:
    return np.full((num_experts + LANES - 1) // LANES * LANES, LEAST)


@numba.njit(inline="always")
def _first_of(rows: Any, part: Any, parts: Any) -> Any:
    """Return the first row of a part; `prange` counts unsigned, which would make it a float."""
    return np.int64(rows) * np.int64(part) // np.int64(parts)


@numba.njit(inline="always")
def _prefetch_rows(scores: Any, first: Any, last: Any) -> None:
    """Fetch rows ahead: where another core or a device has written them, each line takes long."""
    if first < last:
        start = scores[first:].ctypes.data
        for at in range(start, start + 4 * (last - first) * scores.shape[1], CACHE_LINE):
            prefetch(at)


@numba.njit(error_model="numpy")
def _choose_row_by_row(
    scores: Any,
    bias: Any,
    normalise: Any,
    scaling: Any,
    expert_ids: Any,
    expert_weights: Any,
    first: Any,
    last: Any,
) -> None:
    keys = _room_for_keys(bias.shape[0])
    for r in range(first, last):
        _choose_of_row(scores[r], bias, keys, normalise, scaling, expert_ids[r], expert_weights[r])


@numba.njit(error_model="numpy")
def _choose_part(
    scores: Any,
    bias: Any,
    normalise: Any,
    scaling: Any,
    expert_ids: Any,
    expert_weights: Any,
    chooser: Any,
    part: Any,
    parts: Any,
) -> None:
    """Choose for one of `parts` shares of the rows.

    The `chooser`, an address, takes VL rows at a time; 0 if there is none.  It takes no NaN: then
    these rows are chosen for one by one.
    """
    last = _first_of(scores.shape[0], part + 1, parts)
    for row in range(_first_of(scores.shape[0], part, parts), last, VL):
        end = min(row + VL, last)
        _prefetch_rows(scores, end, min(end + VL, last))
        if chooser == 0 or not call_chooser(
            chooser,
            end - row,
            scores[row:].ctypes.data,
            bias.shape[0],
            bias.ctypes.data,
            normalise,
            scaling,
            expert_ids[row:].ctypes.data,
            expert_weights[row:].ctypes.data,
        ):
            _choose_row_by_row(
                scores, bias, normalise, scaling, expert_ids, expert_weights, row, end
            )


@kernel(types.void(ROWS_OUT), parallel=True, error_model="numpy")
def _score(logits: Any) -> None:
    """Make scores of logits, in place."""
    for row in numba.prange(logits.shape[0]):
        for e in range(logits.shape[1]):
            logits[row, e] = _sigmoid(logits[row, e])


CHOOSES = types.void(ROWS, VECTOR, BOOL, FLOAT, IDS_OUT, ROWS_OUT, INT, INT)
CHOOSES_OF_LOGITS = types.void(ROWS, VECTOR, BOOL, FLOAT, IDS_OUT, ROWS_OUT, INT)


@kernel(CHOOSES, parallel=True, error_model="numpy")
def _choose(
    scores: Any,
    bias: Any,
    normalise: Any,
    scaling: Any,
    expert_ids: Any,
    expert_weights: Any,
    chooser: int,
    parts: int,
) -> None:
    for part in numba.prange(parts):
        _choose_part(
            scores,
            bias,
            normalise,
            scaling,
            expert_ids,
            expert_weights,
            chooser,
            np.int64(part),
            parts,
        )


@kernel(CHOOSES_OF_LOGITS, parallel=True, error_model="numpy")
def _choose_of_logits(
    logits: Any,
    bias: Any,
    normalise: Any,
    scaling: Any,
    expert_ids: Any,
    expert_weights: Any,
    parts: int,
) -> None:
    rows = logits.shape[0]
    for part in numba.prange(parts):
        keys = _room_for_keys(bias.shape[0])
        scores = np.empty(logits.shape[1], np.float32)
        for r in range(_first_of(rows, part, parts), _first_of(rows, part + 1, parts)):
            for e in range(logits.shape[1]):
                scores[e] = _sigmoid(logits[r, e])
            _choose_of_row(scores, bias, keys, normalise, scaling, expert_ids[r], expert_weights[r])


POINTERS = types.CPointer(types.voidptr)


@c_function(types.void(POINTERS, POINTERS, POINTERS, INT, INT, INT), error_model="numpy")
def _choose_natively(
    argument: Any, inputs: Any, results: Any, rows: int, part: int, parts: int
) -> None:
    """Choose for a share of the rows, as `lfm2kit.backend.NativeCall` says.

    The argument has the addresses of (num_experts, taken, normalise, chooser) and of
    (scaling, *bias).
    """
    num_experts, taken, normalise, chooser = numba.carray(argument[0], 4, np.int64)
    numbers = numba.carray(argument[1], num_experts + 1, np.float32)
    _choose_part(
        numba.carray(inputs[0], (rows, num_experts), np.float32),
        numbers[1:],
        normalise != 0,
        numbers[0],
        numba.carray(results[0], (rows, taken), np.int32),
        numba.carray(results[1], (rows, taken), np.float32),
        chooser,
        part,
        parts,
    )
