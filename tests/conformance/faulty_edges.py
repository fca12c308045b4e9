"""Backends that are wrong at an edge: all experts taken, many of something, NaN, nobody's rows."""

from __future__ import annotations

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Backend
from lfm2kit.reference import attention, feed_forward, rows, short_conv
from tests.conformance.broken import Around, BrokenBackend, around

EMBEDDING, NORM, HEAD, ROWS = specs.Embedding, specs.RMSNorm, specs.LMHead, specs.LastRows
CONV, ATTENTION, MLP = specs.ShortConv, specs.Attention, specs.MLP
CHOICE, EXPERTS = specs.Choice, specs.Experts


# Numbers of experts, and of ids


class ChoiceByPartition(Around):
    """Partitions the scores at k, which needs an expert that is not taken."""

    def __call__(self, scores):
        np.argpartition(-scores, self.block.spec.num_experts_per_tok, axis=1)
        return self.block(scores)


class SlotsOfTheSpec(feed_forward.Experts):
    """Loops over as many ids as the model takes, however many there are."""

    def __init__(self, spec, weights):
        super().__init__(spec, weights)
        self.slots = spec.num_experts_per_tok

    def __call__(self, x, expert_ids, expert_weights):
        return super().__call__(x, expert_ids[:, : self.slots], expert_weights[:, : self.slots])


class DenseWeights(feed_forward.Experts):
    """Scatters the weights into a table of all experts, where the last one of equal ids stays."""

    def __call__(self, x, expert_ids, expert_weights):
        first = np.argsort(expert_ids, axis=1, kind="stable")
        ids = np.take_along_axis(expert_ids, first, axis=1)
        is_again = np.zeros(ids.shape, bool)
        is_again[:, :-1] = ids[:, 1:] == ids[:, :-1]
        again = np.zeros_like(is_again)
        np.put_along_axis(again, first, is_again, axis=1)
        return super().__call__(x, np.where(again, np.int32(-1), expert_ids), expert_weights)


class AllExpertsButOne(feed_forward.Experts):
    """Counts places from 1 to num_experts - 1."""

    def __init__(self, spec, weights):
        super().__init__(spec, weights)
        self.most = max(1, spec.num_experts - 1)

    def __call__(self, x, expert_ids, expert_weights):
        return super().__call__(x, expert_ids[:, : self.most], expert_weights[:, : self.most])


class RoomFor256Rows(feed_forward.Experts):
    """Keeps 256 rows for each expert, and drops what is beyond."""

    def __call__(self, x, expert_ids, expert_weights):
        kept = expert_ids.copy()
        for e in np.unique(expert_ids):
            some = np.argwhere(expert_ids == e)[256:]
            kept[tuple(some.T)] = -1
        return super().__call__(x, kept, expert_weights)


# Many rows and sequences


class RowsIn16Bits(Around):
    """Counts rows in 16 bits."""

    def __call__(self, hidden, delta, batch):
        wanted = batch.logits_rows.astype(np.uint16).astype(np.int32)
        return self.block(hidden, delta, batch.unchecked(logits_rows=wanted))


class LaunchOf65535Ids(Around):
    """A row for each block of a launch, of which there are 65,535."""

    def __call__(self, batch):
        hidden = self.block(batch)
        hidden[65_535:] = 0
        return hidden


class AsManyAsThereAre(Around):
    """Has room for as many wanted rows as there are rows."""

    def __call__(self, hidden, delta, batch):
        wanted = batch.logits_rows[: len(hidden)]
        return self.block(hidden, delta, batch.unchecked(logits_rows=wanted))


class First512WithAState(Around):
    """A step has places for 512 sequences."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is not None:
            delta[batch.cu_seqlens[512:][:1].sum() or len(delta) :] = 0
        return delta


# Numbers that are not finite


class LastColumnsWithoutNaN(Around):
    """The columns beyond whole vectors are computed by other code, with a maximum."""

    def __call__(self, x):
        whole = x.shape[1] // 16 * 16
        tail = np.nan_to_num(x[:, whole:], nan=0.0, posinf=np.inf, neginf=-np.inf)
        return self.block(np.concatenate([x[:, :whole], tail], axis=1))


class Clipped(Around):
    """Keeps what it multiplies within the range of F16."""

    def __call__(self, x):
        return self.block(np.clip(x, -65504, 65504))


class WeightsWithoutNaN(feed_forward.Experts):
    """Weighs by the larger one of 0 and a weight."""

    def __call__(self, x, expert_ids, expert_weights):
        return super().__call__(x, expert_ids, np.fmax(expert_weights, np.float32(0)))


class NormWithoutNaN(rows.RMSNorm):
    """Adds nothing where a delta is not a number."""

    def __call__(self, hidden, delta):
        return super().__call__(hidden, None if delta is None else np.nan_to_num(delta))


class KeepsNoNaN(short_conv.ShortConv):
    """Keeps rows in a state that cannot hold NaN."""

    def __call__(self, x, batch, state):
        delta = super().__call__(x, batch, state)
        if state is not None:
            state.rows[...] = np.nan_to_num(state.rows)
        return delta


class MaximumWithoutNaN(attention.Attention):
    """Looks for the maximum of scores by comparisons, and gives a key with NaN a weight of 0."""

    def _attend(self, q, k, v):
        past = len(k) - len(q)
        k, v = (np.concatenate([np.nan_to_num(one[:past]), one[past:]]) for one in (k, v))
        return super()._attend(q, k, v)


# Nobody's rows


class MinusZeroOfNobody(feed_forward.Experts):
    """Leaves the -0 that its sum begins with where nothing is added."""

    def __call__(self, x, expert_ids, expert_weights):
        delta = super().__call__(x, expert_ids, expert_weights)
        return delta if self.experts else -delta


class NobodyHasNoShape(feed_forward.Experts):
    """Returns the sum of no arrays where it has no experts."""

    def __call__(self, x, expert_ids, expert_weights):
        if not self.experts:
            return np.zeros(len(x), np.float32)
        return super().__call__(x, expert_ids, expert_weights)


class NobodyIsCounted(feed_forward.Experts):
    """Counts each expert's rows by their ids, of which none may be negative."""

    def __call__(self, x, expert_ids, expert_weights):
        if len(x) and (expert_ids < 0).all():
            np.bincount(expert_ids.ravel())
        return super().__call__(x, expert_ids, expert_weights)


ANY, EMPTY, NONE = "experts-of-any-number", "moe-empty-expert", "experts-none-local"
MANY, TWICE = "rows-among-100000", "last-rows-twice-or-none"
NAN, NAN_OF_STATES = (
    "non-finite-values-reach-the-result",
    "non-finite-values-stay-in-their-sequence",
)

MUTANTS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "choice_by_argpartition": (around(CHOICE, ChoiceByPartition), ("router-shape-grid",)),
    "experts_of_the_specs_number": (BrokenBackend({EXPERTS: SlotsOfTheSpec}), (ANY,)),
    "experts_of_different_ids": (BrokenBackend({EXPERTS: DenseWeights}), (ANY,)),
    "experts_but_one": (BrokenBackend({EXPERTS: AllExpertsButOne}), (ANY,)),
    "experts_of_256_rows": (BrokenBackend({EXPERTS: RoomFor256Rows}), (EMPTY,)),
    "last_rows_in_16_bits": (around(ROWS, RowsIn16Bits), (MANY,)),
    "last_rows_as_many_as_rows": (around(ROWS, AsManyAsThereAre), (TWICE,)),
    "embed_launch_of_65535_rows": (around(EMBEDDING, LaunchOf65535Ids), (MANY,)),
    "attn_steps_of_512_sequences": (
        around(ATTENTION, First512WithAState),
        ("sequences-beyond-1024",),
    ),
    "nan_in_the_last_columns": (around(MLP, LastColumnsWithoutNaN), (NAN,)),
    "infinity_clipped": (around(HEAD, Clipped), (NAN,)),
    "nan_in_expert_weights": (BrokenBackend({EXPERTS: WeightsWithoutNaN}), (NAN,)),
    "nan_in_delta": (BrokenBackend({NORM: NormWithoutNaN}), (NAN,)),
    "nan_in_a_state": (BrokenBackend({CONV: KeepsNoNaN}), (NAN_OF_STATES,)),
    "nan_in_keys": (BrokenBackend({ATTENTION: MaximumWithoutNaN}), (NAN_OF_STATES,)),
    "nobody_leaves_minus_0": (BrokenBackend({EXPERTS: MinusZeroOfNobody}), (NONE,)),
    "nobody_has_no_shape": (BrokenBackend({EXPERTS: NobodyHasNoShape}), (NONE,)),
    "nobody_is_counted": (
        BrokenBackend({EXPERTS: NobodyIsCounted}),
        ("experts-nobody-adds-nothing",),
    ),
}
