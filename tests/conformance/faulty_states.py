"""Backends that are wrong about a state as an argument: whose it is, and what else is touched."""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Backend, Room
from lfm2kit.reference import short_conv
from lfm2kit.reference.backend import BLOCKS, ReferenceBackend
from tests.conformance.broken import Around, BrokenBackend, around

CONV, ATTENTION = specs.ShortConv, specs.Attention
OPERATORS = (CONV, ATTENTION)


STATES: dict[Any, Any] = {}  # of a process


class StatesOfASpec:
    """Blocks of equal specs number their states alike, and find them in one table."""

    def __init__(self, spec: Any, weights: Any) -> None:
        self.spec = spec
        self.block = BLOCKS[type(spec)](spec, weights)
        self.count = 0

    def new_state(self, room: Room) -> Any:
        self.count += 1
        key = self.spec, room, self.count
        STATES.setdefault(key, self.block.new_state(room))
        return key

    def __call__(self, x, batch, state):
        return self.block(x, batch, None if state is None else STATES[state])


class LongCallClobbersTheLastState(Around):
    """Without a state, more than a page of rows is computed in the pages of the last state."""

    last = None

    def __call__(self, x, batch, state):
        if state is not None:
            self.last = state
        elif self.last is not None and len(x) > 64:
            self.last[0][...] = 0
        return self.block(x, batch, state)


class FirstStateForAll(Around):
    """Keeps the first state that it is called with, as a captured step does."""

    first = None

    def __call__(self, x, batch, state):
        if state is not None and self.first is None:
            self.first = state
        return self.block(x, batch, None if state is None else self.first)


class GoesOnWhereItWas(Around):
    """Skips the look into the pages where a step follows the last call's, whoever's it was."""

    ends: Any = None
    state: Any = None

    def __call__(self, x, batch, state):
        goes_on = self.ends is not None and np.array_equal(batch.starts, self.ends)
        used = self.state if goes_on and state is not None and batch.sequences else state
        delta = self.block(x, batch, used)
        if state is not None:
            self.state = used
            self.ends = batch.starts + np.diff(batch.cu_seqlens)
        return delta


class StatelessIsTheNewestState(Around):
    """Makes a state of its own for calls without one, and gives it away as the next new one."""

    spare = None

    def new_state(self, room: Room) -> Any:
        made = self.block.new_state(room)
        self.spare = made
        return made

    def __call__(self, x, batch, state):
        if state is None and self.spare is not None and len(x) == 1:
            self.spare[0][...] = 1
        return self.block(x, batch, state)


class EmptyBatchResets(Around):
    """Takes an empty batch for the end of all sequences."""

    def __call__(self, x, batch, state):
        if state is not None and not batch.sequences:
            state[0][...] = 0
        return self.block(x, batch, state)


class EmptyBatchOfNoShape(Around):
    """Returns an empty list's array where there is nothing to do."""

    def __call__(self, x, batch, state):
        if state is not None and not len(x):
            return np.zeros(0, np.float32)
        return self.block(x, batch, state)


class EmptyTableCrashes(Around):
    """Looks for the widest row of a page table that has no rows."""

    def __call__(self, x, batch, state):
        if state is not None and batch.pages.shape[1]:
            batch.pages[0].max()
        return self.block(x, batch, state)


class ClipsThePages(Around):
    """Makes page 0 of every -1, in the batch's own table, so that no index is negative."""

    def __call__(self, x, batch, state):
        if state is not None:
            np.maximum(batch.pages, 0, out=batch.pages)
        return self.block(x, batch, state)


class WritesThePageBeforeTheFirst(Around):
    """Leaves something in page -1, which is the last one to NumPy, where a row of pages ends."""

    def __call__(self, x, batch, state):
        if state is not None and (batch.pages < 0).any():
            state[0][-1] = 0
        return self.block(x, batch, state)


class ScalesXInMixedBatches(Around):
    """Scales x in place where a prefill comes beside a step."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is not None and batch.starts.any() and not batch.starts.all():
            x *= 2
        return delta


class OtherBitsOfManySteps(Around):
    """Steps of several sequences are one product, whose sums have another order."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        is_step = state is not None and batch.tokens == batch.sequences > 1
        return delta * np.float32(1 + 1e-7) if is_step else delta


class OtherBitsBesideAPrefill(Around):
    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is not None and batch.sequences > 1 and batch.tokens > batch.sequences:
            delta[: batch.cu_seqlens[1]] *= np.float32(1 + 1e-7)
        return delta


class StateIn16Bits(short_conv.ShortConv):
    """Keeps its rows in 16 bits, which a call without a state does not."""

    def __call__(self, x, batch, state):
        delta = super().__call__(x, batch, state)
        if state is not None:
            state.rows[...] = state.rows.astype(np.float16)
        return delta


class CountsOneNumber(BrokenBackend):
    """Counts keys and forgets the values."""

    def state_bytes(self, spec, room):
        return ReferenceBackend().state_bytes(spec, room) // 2


class CountsFloat32(BrokenBackend):
    """Counts four bytes for each number of a state that has eight."""

    def state_bytes(self, spec, room):
        is_conv = isinstance(spec, CONV)
        return ReferenceBackend().state_bytes(spec, room) // (2 if is_conv else 1)


class CountsNoStepsBack(BrokenBackend):
    """Counts the rows before the next token alone, and not those for steps back."""

    def state_bytes(self, spec, room):
        if isinstance(spec, CONV):
            return 8 * room.pages * (spec.kernel_size - 1) * spec.hidden_size
        return super().state_bytes(spec, room)


class CountsOnePage(BrokenBackend):
    def state_bytes(self, spec, room):
        return ReferenceBackend().state_bytes(spec, Room(min(room.pages, 1), room.page_tokens))


class CountsPagesOf128(BrokenBackend):
    def state_bytes(self, spec, room):
        return ReferenceBackend().state_bytes(spec, Room(room.pages, 128))


class CountsTokens(BrokenBackend):
    """Returns the number of numbers, not of bytes."""

    def state_bytes(self, spec, room):
        return ReferenceBackend().state_bytes(spec, room) // 8


class CountsAsAFloat(BrokenBackend):
    def state_bytes(self, spec, room):
        return ReferenceBackend().state_bytes(spec, room) * 1.0


class OfASpecsStates(BrokenBackend):
    def __init__(self) -> None:
        super().__init__(dict.fromkeys(OPERATORS, StatesOfASpec))


TOGETHER, FORKS = "sequences-of-equal-length", "state-forks-share-pages"
MIXED = "state-prefill-beside-decode"
OWN, EMPTY, HAS = "state-belongs-to-its-caller", "state-of-an-empty-batch", "operator-has-state"
UNWRITTEN = "inputs-not-written"

MUTANTS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "state_of_equal_specs": (OfASpecsStates(), (OWN,)),
    "state_clobbered_by_a_long_call": (around(ATTENTION, LongCallClobbersTheLastState), (OWN,)),
    "state_that_came_first": (around(CONV, FirstStateForAll), (OWN,)),
    "state_that_came_last": (around(ATTENTION, GoesOnWhereItWas), (OWN,)),
    "state_clobbered_by_a_single_row": (around(CONV, StatelessIsTheNewestState), (OWN,)),
    "empty_batch_resets_states": (around(CONV, EmptyBatchResets), (EMPTY,)),
    "empty_batch_without_a_shape": (around(ATTENTION, EmptyBatchOfNoShape), (EMPTY,)),
    "empty_table_of_pages": (around(ATTENTION, EmptyTableCrashes), (EMPTY,)),
    "writes_pages_beyond_a_row": (around(ATTENTION, ClipsThePages), (UNWRITTEN,)),
    "writes_x_in_mixed_batches": (around(CONV, ScalesXInMixedBatches), (UNWRITTEN,)),
    "writes_page_minus_1": (
        around(ATTENTION, WritesThePageBeforeTheFirst),
        (MIXED,),
    ),
    "other_bits_of_many_steps": (
        around(ATTENTION, OtherBitsOfManySteps),
        (TOGETHER, FORKS),
    ),
    "other_bits_beside_a_prefill": (
        around(CONV, OtherBitsBesideAPrefill),
        (TOGETHER,),
    ),
    "state_in_16_bits": (
        BrokenBackend({CONV: StateIn16Bits}),
        ("state-chunked-equals-one-shot",),
    ),
    "state_bytes_without_values": (CountsOneNumber({}), (HAS,)),
    "state_bytes_of_float32": (CountsFloat32({}), (HAS,)),
    "state_bytes_without_steps_back": (CountsNoStepsBack({}), (HAS,)),
    "state_bytes_of_one_page": (CountsOnePage({}), (HAS,)),
    "state_bytes_of_pages_of_128": (CountsPagesOf128({}), (HAS,)),
    "state_bytes_of_numbers": (CountsTokens({}), (HAS,)),
    "state_bytes_as_a_float": (CountsAsAFloat({}), (HAS,)),
}
