"""Backends that an author could plausibly write, with faults that short tests do not show.

Each is right for small sizes, for a call without a state, or for weights of one type, and wrong
where a real run goes.  `MUTANTS` names the checks that catch each; those that `broken` has already
are listed from there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Backend, Block, Weights
from lfm2kit.reference import attention, rows, short_conv
from lfm2kit.weights import Tensor
from tests.conformance import (
    broken,
    faulty_capabilities,
    faulty_edges,
    faulty_results,
    faulty_states,
    faulty_storage,
)
from tests.conformance.broken import Around, BrokenBackend, around

# Sizes beyond those of a short test


class OtherBitsFrom256Rows(Around):
    """Rounds otherwise from 256 rows on, as a library does that then splits its sums."""

    def __call__(self, x):
        return self.block(x) * np.float32(1 + 1e-7 * (len(x) >= 256))


class FirstSequences(Around):
    """A launch has places for some sequences, and nobody starts a second one for the rest.

    Plausible wherever a grid or a table in constant memory has a fixed size.
    """

    places = 32

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if batch.sequences > self.places:
            delta[batch.cu_seqlens[self.places] :] = 0
        return delta


class First512Sequences(FirstSequences):
    places = 512


class First2048Sequences(FirstSequences):
    places = 2048


class SplitDecodeNotRescaled(attention.Attention):
    """A step over more than 128 tokens is computed in two parts, which are added unweighted.

    Each part has a maximum and a sum of its own; flash decoding must scale by them.
    """

    def _attend(self, q, k, v):
        if len(q) > 1 or len(k) <= 128:
            return super()._attend(q, k, v)
        first = super()._attend(q, k[:128], v[:128])
        return (first + super()._attend(q, k[128:], v[128:])) / 2


class RopeTable(attention.Attention):
    """A table of angles ends early; later positions take its last row."""

    size = 2048

    def _rotated(self, heads, name, positions):
        return super()._rotated(heads, name, np.minimum(positions, self.size - 1))


class RopeTableOf65536(RopeTable):
    size = 65536


class RopeTableOf262144(RopeTable):
    size = 262144


class TilesWithoutHalo(short_conv.ShortConv):
    """The convolution runs in tiles, whose first rows see zeros before them.

    Only the first tile is given the rows before it.
    """

    tile = 64

    def _convolve(self, u):
        before = self.spec.kernel_size - 1
        first, rest = u[: before + self.tile], u[before + self.tile :]
        y = super()._convolve(first)
        if not len(rest):
            return y
        return np.concatenate([y, self._convolve(np.concatenate([0 * u[:before], rest]))])


class LargeTilesWithoutHalo(TilesWithoutHalo):
    tile = 1024


class HugeTilesWithoutHalo(TilesWithoutHalo):
    tile = 4096


class EqualLengthsLeak(short_conv.ShortConv):
    """Sequences of one length are convolved as one array, each seeing the end of the one before.

    `lfm2kit run` sends nothing but samples of one length; ragged batches take another path.
    """

    def __call__(self, x, batch, state):
        lengths = np.diff(batch.cu_seqlens)
        if state is None and len(lengths) > 1 and lengths.min() == lengths.max() > 1:
            ends = np.array([0, batch.tokens], np.int32)
            batch = batch.unchecked(cu_seqlens=ends, pages=batch.pages[:1])
        return super().__call__(x, batch, state)


class OnePastForAll(short_conv.ShortConv):
    """Chunks of one length are convolved as one array of sequences, all after the first one's past.

    A broadcast of shape [1, kernel_size - 1, hidden_size] fits, and nobody notices.
    """

    def __call__(self, x, batch, state):
        lengths = np.diff(batch.cu_seqlens)
        self.is_even = len(lengths) > 1 and lengths.min() == lengths.max() > 1
        self.first = None
        return super().__call__(x, batch, state)

    def _past(self, state, pages, start):
        past = super()._past(state, pages, start)
        if not self.is_even or start == 0:
            return past
        self.first = past if self.first is None else self.first
        return self.first


class LaunchOf65535Rows(Around):
    """A row for each block of a launch, of which there are 65,535: later rows stay unwritten."""

    def __call__(self, x):
        result = self.block(x)
        result[65_535:] = 0
        return result


class IdsIn16Bits(Around):
    """Token ids are read as int16; the release has 65,536 of them."""

    def __call__(self, batch):
        ids = np.maximum(batch.token_ids.astype(np.int16), 0).astype(np.int32)
        return self.block(batch.unchecked(token_ids=ids))


class ReadsSomeColumns(Around):
    """A head that keeps a row of 1,024 values on chip, and never sees the rest of x."""

    def __call__(self, x):
        return self.block(np.where(np.arange(x.shape[1]) < 1024, x, np.float32(0)))


class WritesSomeColumns(Around):
    """A copy by one thread for each column, of which a block of a launch has 1,024."""

    def __call__(self, *inputs):
        result = self.block(*inputs)
        for array in result if isinstance(result, tuple) else (result,):
            array[:, 1024:] = 0
        return result


# What a result is


class FortranOrder(Around):
    """A product that is transposed: BLAS in column-major order gives nothing else."""

    def __call__(self, x):
        return np.asfortranarray(self.block(x))


class EveryOtherRow(Around):
    """A view with gaps: the rows of a padded buffer, for example."""

    def __call__(self, x):
        result = self.block(x)
        padded = np.empty((len(result), 2, result.shape[1]), np.float32)
        padded[:, 0] = result
        return padded[:, 0]


class ForeignArray:
    """What another library returns: it has a shape and a dtype, but is not a NumPy array."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.values, dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]


class ReturnsForeignArray(Around):
    """Forgets `.numpy()` after a product in another library."""

    def __call__(self, x):
        return ForeignArray(self.block(x))


class ReturnsNothing(Around):
    """Forgets `return`."""

    def __call__(self, x):
        self.block(x)


class LacksARow(Around):
    """Rounds the number of rows down to whole tiles; what is read beyond looks like any number."""

    def __call__(self, x):
        return self.block(x)[: len(x) // 4 * 4].copy() if len(x) > 4 else self.block(x)


class ReturnsAView(Around):
    """Skips the copy where all rows are wanted in order, as a step of decoding wants them."""

    def __call__(self, hidden, delta, batch):
        if np.array_equal(batch.logits_rows, np.arange(len(hidden))):
            return hidden[:], delta[:]
        return self.block(hidden, delta, batch)


class ViewOfTheTable(rows.Embedding):
    """One token's embedding is a view of the table; a norm that adds in place changes the weights.

    Indexing by a slice or an integer is a view in NumPy, indexing by an array is not.
    """

    def __init__(self, spec, weights):
        self.table = weights.float32("weight").copy()

    def __call__(self, batch):
        if batch.tokens == 1:
            first = int(batch.token_ids[0])
            return self.table[first : first + 1]
        return self.table[batch.token_ids]


# What lies beside an array


def beside(array: Any, first: int, size: int) -> Any:
    """Return `size` elements of an array's type from index `first` on, within its allocation.

    None where its allocation ends before: the tests' own memory must stay whole.
    """
    owner = array.base
    if not isinstance(owner, np.ndarray) or array.dtype != np.float32:
        return None
    start = array.ctypes.data - owner.ctypes.data + 4 * first
    if start < 0 or start + 4 * size > owner.nbytes:
        return None
    return np.ndarray(size, np.float32, owner.reshape(-1).view(np.uint8), start)


class WritesBehindX(Around):
    """Uses the rest of a tile as scratch, where x has fewer rows."""

    def __call__(self, x):
        result = self.block(x)
        if (rest := beside(x, x.size, 4)) is not None:
            rest[:] = 0
        return result


class WritesBeforeTheWeight:
    """Notes something before a table, as an allocator of its own would."""

    def __init__(self, spec, weights):
        self.block = rows.Embedding(spec, weights)
        self.table = weights["weight"].data

    def __call__(self, batch):
        if (header := beside(self.table, -1, 1)) is not None:
            header[:] = 1
        return self.block(batch)


class ReadsBehindX(Around):
    """Multiplies what is beyond the last row by 0, which is right for any number but NaN."""

    def __call__(self, x):
        result = self.block(x)
        rest = beside(x, x.size, 4)
        return result if rest is None else result + np.float32(0) * rest.sum()


class FillsOneRowMore(Around):
    """Fills whole tiles of rows."""

    def __call__(self, x):
        return self.block(x)

    def fill(self, results, x):
        (result,) = results
        result[:] = self.block(x)
        if (rest := beside(result, result.size, 4)) is not None:
            rest[:] = 0


class RoundsAddressesDown(Around):
    """Loads rows of the table in whole vectors of 16 bytes, from where the last of them began."""

    def __init__(self, spec, weights):
        super().__init__(rows.Embedding(spec, weights))
        self.skipped = weights["weight"].data.ctypes.data % 16

    def __call__(self, batch):
        result = self.block(batch)
        return np.roll(result, 1, axis=1) if self.skipped else result


# A state as an argument


class WritesItsInputWithAState(Around):
    """Uses x as scratch in the path with a state only."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is not None:
            x *= 0
        return delta


class AddsZeroInPlace(Around):
    """Makes 0 of every -0 in its argument: no value changes, but bits do."""

    def __call__(self, x):
        x += np.float32(0)
        return self.block(x)


class ScratchInTheLastState(Around):
    """Without a state it computes in the pages of the last one that it was given."""

    last = None

    def __call__(self, x, batch, state):
        if state is not None:
            self.last = state
        elif self.last is not None:
            self.last.rows[:] = x[:1]
        return self.block(x, batch, state)


# Rows that are wanted


class NoRowWantedRaises(Around):
    """Takes the largest of the wanted rows, of which there may be none."""

    def __call__(self, hidden, delta, batch):
        if len(hidden):
            batch.logits_rows.max()
        return self.block(hidden, delta, batch)


class RowsWantedOnce(Around):
    """Sorts the wanted rows and drops doubles, as a set would."""

    def __call__(self, hidden, delta, batch):
        once = np.unique(batch.logits_rows)
        if len(once) < len(batch.logits_rows):
            batch = batch.unchecked(logits_rows=once)
        return self.block(hidden, delta, batch)


# How weights are stored


def norms_stored_as_matrices(spec: specs.Attention, weights: Weights) -> Block:
    """Take the norms to be stored as q_proj is, and so misread F32 norms beside BF16 matrices."""
    stored = weights["q_proj.weight"].format
    misread = {
        name: Tensor(name, stored, t.shape, t.data.astype(stored.block))
        for name, t in ((name, weights[name]) for name in spec.parameters())
    }
    return attention.Attention(spec, Weights(misread))


# Which specs are built


class OnlyTheReleasesMLP(BrokenBackend):
    """Its kernel is written for the sizes of LFM2-8B-A1B, and none of the suite's is among them."""

    def why_unsupported(self, spec):
        if isinstance(spec, specs.MLP) and spec != specs.MLP(2048, 7168):
            return "its kernel takes 2048 by 7168"
        return super().why_unsupported(spec)


CONV, ATTENTION, MLP = specs.ShortConv, specs.Attention, specs.MLP
EMBEDDING, ROWS, EXPERTS = specs.Embedding, specs.LastRows, specs.Experts
HEAD = specs.LMHead

# Name of the mutant: the backend, and the checks that must fail.
MUTANTS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    **faulty_results.MUTANTS,
    **faulty_states.MUTANTS,
    **faulty_capabilities.MUTANTS,
    **faulty_edges.MUTANTS,
    **faulty_storage.MUTANTS,
    "attn_first_32_sequences": (around(ATTENTION, FirstSequences), ("many-sequences",)),
    "attn_split_decode_not_rescaled": (
        BrokenBackend({ATTENTION: SplitDecodeNotRescaled}),
        ("state-decode-after-600-tokens",),
    ),
    "attn_first_512_sequences": (
        around(ATTENTION, First512Sequences),
        ("sequences-beyond-1024",),
    ),
    "biases_read_as_raw_bits": (
        BrokenBackend({CONV: broken.RawBitsOfBiases}),
        ("bf16-and-f16-weights",),
    ),
    "beyond_x_read": (around(MLP, ReadsBehindX), ("mlp", "outputs-finite")),
    "beyond_x_written": (around(MLP, WritesBehindX), ("mlp", "inputs-not-written")),
    "before_a_weight_written": (
        BrokenBackend({EMBEDDING: WritesBeforeTheWeight}),
        ("embedding", "inputs-not-written"),
    ),
    "beyond_a_filled_result": (
        around(MLP, FillsOneRowMore),
        ("filled-results-have-the-same-bits",),
    ),
    "capture_replays_old_ids": (
        broken.BakesIn("token_ids"),
        ("captured-forward", "captured-steps"),
    ),
    "conv_no_halo_between_tiles": (
        BrokenBackend({CONV: TilesWithoutHalo}),
        ("sequences-of-300-tokens", "state-chunked-equals-one-shot"),
    ),
    "conv_no_halo_between_tiles_of_1024": (
        BrokenBackend({CONV: LargeTilesWithoutHalo}),
        ("convolutions-of-3000-tokens",),
    ),
    "conv_uniform_batches_leak": (
        BrokenBackend({CONV: EqualLengthsLeak}),
        ("sequences-of-equal-length",),
    ),
    "conv_one_past_for_all": (
        BrokenBackend({CONV: OnePastForAll}),
        ("sequences-of-equal-length",),
    ),
    "embed_at_aligned_addresses": (
        BrokenBackend({EMBEDDING: RoundsAddressesDown}),
        ("weights-at-any-address",),
    ),
    "embed_ids_in_int16": (around(EMBEDDING, IdsIn16Bits), ("ids-beyond-32767",)),
    "embed_of_1024_columns": (around(EMBEDDING, WritesSomeColumns), ("real-widths",)),
    "empty_batch_with_state": (
        around(ATTENTION, broken.EmptyBatchCrashes),
        ("state-of-an-empty-batch",),
    ),
    "experts_stop_at_1024_columns": (
        BrokenBackend({EXPERTS: broken.ExpertsStopAt1024Columns}),
        ("real-widths",),
    ),
    "head_of_1024_columns": (around(HEAD, ReadsSomeColumns), ("real-widths",)),
    "last_rows_of_1024_columns": (around(ROWS, WritesSomeColumns), ("real-widths",)),
    "last_rows_none_wanted": (around(ROWS, NoRowWantedRaises), ("last-rows-twice-or-none",)),
    "logits_rows_twice": (around(ROWS, RowsWantedOnce), ("last-rows-twice-or-none",)),
    "mlp_other_bits_from_256_rows": (around(MLP, OtherBitsFrom256Rows), ("rows-among-300",)),
    "mlp_launch_of_65535_rows": (around(MLP, LaunchOf65535Rows), ("rows-among-100000",)),
    "mlp_of_the_release_alone": (OnlyTheReleasesMLP({}), ("every-kind-built-is-judged",)),
    "mlp_large_batch_path_wrong": (
        BrokenBackend({MLP: broken.OtherKernelForManyRows}),
        ("mlp",),
    ),
    "norms_in_f32_beside_bf16": (
        BrokenBackend({ATTENTION: norms_stored_as_matrices}),
        ("weights-of-several-types",),
    ),
    "only_real_sizes_state_not_reset": (
        broken.MultiplesOf256({CONV: broken.ConvStateNotReset}),
        ("state-fresh-at-position-zero",),
    ),
    "out_fortran_order": (around(MLP, FortranOrder), ("results-are-plain-arrays",)),
    "out_has_gaps": (around(MLP, EveryOtherRow), ("results-are-plain-arrays",)),
    "out_is_none": (around(MLP, ReturnsNothing), ("results-are-plain-arrays",)),
    "out_is_view_of_argument": (around(ROWS, ReturnsAView), ("results-are-new-arrays",)),
    "out_is_view_of_table": (
        BrokenBackend({EMBEDDING: ViewOfTheTable}),
        ("results-are-new-arrays",),
    ),
    "out_lacks_a_row": (around(MLP, LacksARow), ("results-are-plain-arrays",)),
    "out_not_an_ndarray": (around(MLP, ReturnsForeignArray), ("results-are-plain-arrays",)),
    "rope_table_of_2048": (
        BrokenBackend({ATTENTION: RopeTable}),
        ("state-positions-beyond-32768",),
    ),
    "rope_table_of_65536": (
        BrokenBackend({ATTENTION: RopeTableOf65536}),
        ("state-positions-beyond-32768",),
    ),
    "router_topk_by_argpartition": (
        BrokenBackend({specs.Router: broken.FewerThanAllTaken}),
        ("router-shape-grid",),
    ),
    "state_bytes_is_zero": (broken.StateOfNoBytes({}), ("operator-has-state",)),
    "state_kept_in_block": (
        around(CONV, broken.StateInTheBlock),
        ("state-belongs-to-its-caller",),
    ),
    "stateless_call_clobbers_state": (
        around(CONV, ScratchInTheLastState),
        ("state-belongs-to-its-caller",),
    ),
    "writes_equal_values": (around(MLP, AddsZeroInPlace), ("inputs-not-written",)),
    "writes_input_when_decoding": (
        around(CONV, WritesItsInputWithAState),
        ("inputs-not-written",),
    ),
}

# Backends that no check catches, and why.
MISSED: dict[str, tuple[Backend, str]] = {
    "attn_first_2048_sequences": (
        around(ATTENTION, First2048Sequences),
        "no batch has more than 1030 sequences; each more costs the reference 0.1 ms in every call",
    ),
    "conv_no_halo_between_tiles_of_4096": (
        BrokenBackend({CONV: HugeTilesWithoutHalo}),
        "no sequence that ShortConv is given has more than 3000 tokens",
    ),
    "rope_table_of_262144": (
        BrokenBackend({ATTENTION: RopeTableOf262144}),
        "no position lies beyond 131,072; twice as many keys take the reference half a second",
    ),
}
