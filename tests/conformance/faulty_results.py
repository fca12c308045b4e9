"""Backends whose results have the right values, and are not what a result must be."""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Backend
from lfm2kit.reference import rows
from tests.conformance.broken import Around, BrokenBackend, around

EMBEDDING, NORM, HEAD, ROWS = specs.Embedding, specs.RMSNorm, specs.LMHead, specs.LastRows
CONV, ATTENTION, MLP = specs.ShortConv, specs.Attention, specs.MLP
CHOICE, EXPERTS = specs.Choice, specs.Experts


class Subclass(np.ndarray):
    """What `np.matrix`, `np.memmap` and tensors of some libraries are: it calculates otherwise."""


class ReturnsASubclass(Around):
    def __call__(self, *inputs):
        return self.block(*inputs).view(Subclass)


class TransposedFrom64Rows(Around):
    """A product of many rows by a library in column-major order; few rows have another kernel."""

    def __call__(self, x):
        result = self.block(x)
        return np.asfortranarray(result) if len(x) >= 64 else result


class TransposedIds(Around):
    """Takes the first k columns of a sorted array, of which the rows are further apart."""

    def __call__(self, scores):
        ids, weights = self.block(scores)
        padded = np.zeros((len(ids), scores.shape[1] + 1), np.int32)
        padded[:, : ids.shape[1]] = ids
        return padded[:, : ids.shape[1]], weights


class StridedStep(Around):
    """Writes a step's rows into a buffer whose rows are padded to whole vectors."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is None or batch.tokens > batch.sequences:
            return delta
        padded = np.zeros((len(delta), delta.shape[1] + 8), np.float32)
        padded[:, : delta.shape[1]] = delta
        return padded[:, : delta.shape[1]]


class Unaligned(Around):
    """Carves its result from bytes, behind a header of one byte."""

    def __call__(self, *inputs):
        result = self.block(*inputs)
        owner = np.empty(result.nbytes + 1, np.uint8)
        unaligned = np.ndarray(result.shape, result.dtype, owner, 1)
        unaligned[...] = result
        return unaligned


class ReadOnly(Around):
    """Freezes its results, so that nobody spoils what it remembers."""

    def __call__(self, *inputs):
        result = self.block(*inputs)
        for array in result if isinstance(result, tuple) else (result,):
            array.flags.writeable = False
        return result


class ReadOnlyManyRows(Around):
    def __call__(self, x):
        result = self.block(x)
        result.flags.writeable = len(x) < 64
        return result


class ReturnsAList(Around):
    """Returns its two arrays as a list."""

    def __call__(self, *inputs):
        return list(self.block(*inputs))


class BufferForSteps(Around):
    """Steps have a buffer for their result, since their form never changes."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.buffers: dict[int, Any] = {}

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is None or batch.tokens > batch.sequences:
            return delta
        buffer = self.buffers.setdefault(len(delta), delta)
        buffer[...] = delta
        return buffer


class BufferForOneRow(Around):
    """A single row has a buffer, a larger result is allocated."""

    buffer = None

    def __call__(self, x):
        result = self.block(x)
        if len(x) != 1:
            return result
        if self.buffer is None:
            self.buffer = result
        self.buffer[...] = result
        return self.buffer


class RingOfBuffers(Around):
    """Four buffers take turns, in the hope that no result is needed for longer."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.ring = [np.empty(100_000, np.float32) for _ in range(4)]

    def __call__(self, *inputs):
        result = self.block(*inputs)
        if result.size > len(self.ring[0]):
            return result
        self.ring.append(self.ring.pop(0))
        out = self.ring[0][: result.size].reshape(result.shape)
        out[...] = result
        return out


class RemembersItsResult(Around):
    """Computes nothing where it is given what it was given before."""

    before: Any = None
    result: Any = None

    def __call__(self, x):
        if self.before is None or not np.array_equal(self.before, x):
            self.before, self.result = x.copy(), self.block(x)
        return self.result


class ResultInTheState(Around):
    """Leaves a step's result in page 0, in the hope that no sequence of the batch has it."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is None or len(delta) > len(state.rows):
            return delta
        place = state.rows.reshape(-1).view(np.float32)[: delta.size].reshape(delta.shape)
        place[...] = delta
        return place


class ZerosOfNobody(Around):
    """Returns one array of zeros wherever nothing is to be added."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.zeros: dict[tuple[int, ...], Any] = {}

    def __call__(self, x, expert_ids, expert_weights):
        if np.isin(expert_ids, list(self.block.experts)).any():
            return self.block(x, expert_ids, expert_weights)
        return self.zeros.setdefault(x.shape, np.zeros(x.shape, np.float32))


class SliceOfTheTable(rows.Embedding):
    """Ids that follow each other are a slice of the table, which needs no copy."""

    def __init__(self, spec, weights):
        self.table = weights.float32("weight").copy()

    def __call__(self, batch):
        ids = batch.token_ids
        if len(ids) > 1 and np.all(np.diff(ids) == 1):
            return self.table[ids[0] : ids[-1] + 1]
        return self.table[ids]


class SliceOfTheRows(Around):
    """Rows that follow each other are a slice of the argument."""

    def __call__(self, hidden, delta, batch):
        wanted = batch.logits_rows
        if len(wanted) > 1 and np.all(np.diff(wanted) == 1):
            rows = slice(wanted[0], wanted[-1] + 1)
            return hidden[rows], delta[rows]
        return self.block(hidden, delta, batch)


class NormInPlaceOfHidden(rows.RMSNorm):
    """Leaves x where `hidden` was: only the sum may lie there."""

    def __call__(self, hidden, delta):
        total, x = super().__call__(hidden, delta)
        total = total.copy()
        hidden[...] = x
        return total, hidden


class NormsTheArgument(rows.RMSNorm):
    """Uses `hidden` as scratch, and returns new arrays."""

    def __call__(self, hidden, delta):
        total, x = super().__call__(hidden, delta)
        total = total.copy()
        hidden *= 2
        return total, x


class OverlappingResults(Around):
    """Keeps ids and weights of a row side by side in one array of 32-bit numbers."""

    def __call__(self, scores):
        ids, weights = self.block(scores)
        both = np.empty((len(ids), 2, ids.shape[1]), np.int32)
        both[:, 0], both[:, 1] = ids, weights.view(np.int32)
        return both[:, 0], both[:, 1].view(np.float32)


class IdsOfAnotherType(Around):
    """Leaves the ids as NumPy's argsort gives them."""

    def __call__(self, scores):
        ids, weights = self.block(scores)
        return ids.astype(np.int64), weights


class OtherByteOrder(Around):
    """Leaves the numbers in the byte order of a file."""

    def __call__(self, x):
        return self.block(x).astype(">f4")


class ScalarForNothing(Around):
    """Adds rows up in Python and returns the start of the sum where there are none."""

    def __call__(self, x):
        return self.block(x) if len(x) else np.float32(0)


PLAIN, NEW, KEPT = (
    "results-are-plain-arrays",
    "results-are-new-arrays",
    "results-belong-to-the-caller",
)

MUTANTS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "out_is_a_subclass": (around(MLP, ReturnsASubclass), (PLAIN,)),
    "out_is_a_list": (around(CHOICE, ReturnsAList), (PLAIN,)),
    "out_fortran_order_from_64_rows": (around(MLP, TransposedFrom64Rows), (PLAIN,)),
    "out_ids_have_gaps": (around(CHOICE, TransposedIds), (PLAIN,)),
    "out_of_a_step_has_gaps": (around(ATTENTION, StridedStep), (PLAIN,)),
    "out_unaligned": (around(HEAD, Unaligned), (PLAIN,)),
    "out_ids_of_int64": (around(CHOICE, IdsOfAnotherType), (PLAIN,)),
    "out_of_another_byte_order": (around(MLP, OtherByteOrder), (PLAIN,)),
    "out_of_no_rows_is_a_number": (around(MLP, ScalarForNothing), ("zero-rows",)),
    "out_read_only": (around(CHOICE, ReadOnly), (NEW,)),
    "out_read_only_from_64_rows": (around(HEAD, ReadOnlyManyRows), (NEW,)),
    "out_of_steps_in_one_buffer": (around(ATTENTION, BufferForSteps), (KEPT,)),
    "out_of_one_row_in_one_buffer": (around(MLP, BufferForOneRow), (KEPT,)),
    "out_in_a_ring_of_buffers": (around(EXPERTS, RingOfBuffers), (KEPT,)),
    "out_is_remembered": (around(MLP, RemembersItsResult), (NEW,)),
    "out_lies_in_the_state": (around(CONV, ResultInTheState), (KEPT,)),
    "out_is_a_constant_of_zeros": (around(EXPERTS, ZerosOfNobody), ("experts-none-local",)),
    "out_is_a_slice_of_the_table": (BrokenBackend({EMBEDDING: SliceOfTheTable}), ("embedding",)),
    "out_is_a_slice_of_the_argument": (around(ROWS, SliceOfTheRows), ("last-rows-twice-or-none",)),
    "norm_leaves_x_in_hidden": (
        BrokenBackend({NORM: NormInPlaceOfHidden}),
        (NEW, "inputs-not-written"),
    ),
    "norm_writes_hidden": (BrokenBackend({NORM: NormsTheArgument}), ("inputs-not-written",)),
    "out_ids_and_weights_side_by_side": (around(CHOICE, OverlappingResults), (PLAIN,)),
}
