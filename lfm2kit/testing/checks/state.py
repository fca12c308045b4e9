"""The operators' state, in chunks, decoding and slots: where LFM2 in batches goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from lfm2kit import specs
from lfm2kit.specs import Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import Result, assert_close, assert_same
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_rows
from lfm2kit.testing.sessions import Float32, Session, joined, one_shot
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed

DENSE_LAYERS = tuple(
    spec
    for spec in CASES["layer"]
    if isinstance(spec, specs.Layer) and isinstance(spec.feed_forward, specs.MLP)
)
OPERATORS: tuple[Spec, ...] = (*CASES["conv"], *CASES["attn"], *DENSE_LAYERS)


@check
def operator_has_state(trial: Trial) -> None:
    """Blocks of operators and layers have `new_state` and `state_bytes`, which never shrinks.

    `state_bytes` is what `lfm2kit plan` and a server's admission count with.
    """
    for spec in trial.supported(OPERATORS):
        block = trial.build(spec, trial.random_weights(spec))
        for method in ("new_state", "state_bytes"):
            if not callable(getattr(block.block, method, None)):
                raise CheckFailed(f"{spec}: the block has no method {method}")
        sizes = [block.state_bytes(*room) for room in ((1, 1), (1, 64), (3, 64), (3, 1000))]
        if sizes != sorted(sizes) or sizes[0] < 0:
            raise CheckFailed(f"{spec}: state_bytes of growing states: {sizes}")
        block.new_state(1, 1)


@check
def state_fresh_at_position_zero(trial: Trial) -> None:
    """A sequence at position 0 starts afresh, whatever its slot holds: another's rows, or NaN.

    Also where it is shorter than the kernel and goes on: the missing rows are zeros, not the
    former sequence's.
    """
    for spec, block, reference in _operators(trial):
        x = random_rows(trial.rng, 6, _size(spec))
        want = one_shot(spec, reference, x)
        for garbage in (np.full_like(x, np.nan), random_rows(trial.rng, 9, _size(spec), 100.0)):
            for lengths in ([6], [1, 1, 1, 1, 1, 1], [2, 4]):
                session = Session(spec, block, 2, 9)
                session.feed((1, garbage))
                session.restart(1)
                got = session.feed_in_chunks(1, x, lengths)
                what = f"{spec}, chunks of {lengths} in a used slot"
                assert_close(got, want, trial.tolerance, what)


@check
def state_chunked_equals_one_shot(trial: Trial) -> None:
    """A sequence in chunks of 1, 2, 3, 5 gives what it gives in one call.

    Chunks shorter than the kernel must keep the older rows of the state (vllm#56196); a state of
    exactly the sequence's length must do.
    """
    for spec, block, reference in _operators(trial):
        x = random_rows(trial.rng, 17, _size(spec))
        want = one_shot(spec, reference, x)
        for lengths in (*map(_chunks_of, (1, 2, 3, 5)), [16, 1], [1, 16], [2, 1, 14], [17]):
            got = Session(spec, block, 2, 17).feed_in_chunks(1, x, lengths)
            assert_close(got, want, trial.tolerance, f"{spec} in chunks of {lengths}")


@check
def state_decode_batch(trial: Trial) -> None:
    """Several sequences decode one token each per call, in any order, in slots of any order.

    A batch of sequences of length 1 is where strides and broadcasts are misread
    (mistral.rs#2357).
    """
    prompts = {4: 5, 0: 1, 2: 9}  # tokens by slot
    for spec, block, reference in _operators(trial):
        feeder = _Feeder(spec, block, reference, trial, slots=5)
        feeder.feed(prompts)
        for _ in range(4):
            feeder.feed({int(slot): 1 for slot in trial.rng.permutation(list(prompts))})
        feeder.judge("decoded in batches")


@check
def state_prefill_beside_decode(trial: Trial) -> None:
    """One call may hold one sequence's first tokens, another's next one, and a chunk of a third."""
    for spec, block, reference in _operators(trial):
        feeder = _Feeder(spec, block, reference, trial, slots=4)
        for lengths in ({3: 7, 1: 2}, {0: 4, 3: 1, 1: 2}, {1: 1, 3: 3, 0: 1}, {2: 1, 0: 5}):
            feeder.feed(lengths)
        feeder.judge("in mixed batches")


@check
def state_slots_do_not_leak(trial: Trial) -> None:
    """What other slots are fed, NaN even, changes no bit of a slot's results."""
    for spec, block, _ in _operators(trial):
        x = random_rows(trial.rng, 7, _size(spec))
        between = [random_rows(trial.rng, 7, _size(spec)), np.full_like(x, np.nan)]
        of_values, of_nan = (_fed_between(Session(spec, block, 3, 7), x, y) for y in between)
        assert_same(of_nan, of_values, f"{spec}, between slots of NaN and of values")


def _fed_between(session: Session, x: Float32, others: Float32) -> Result:
    """The results of `x` [7, hidden_size] in slot 1, fed in chunks with the slots around it.

    Now before and now after them: the last one to write a place is the one whose values stay.
    """
    parts = []
    for i, (start, end) in enumerate(pairwise((0, 3, 4, 6, 7))):
        rows = slice(start, end)
        first, last = (0, 2) if i % 2 else (2, 0)
        parts.append(session.feed((first, others[rows]), (1, x[rows]), (last, others[rows]))[1])
    return joined(parts)


@check
def state_random_schedule(trial: Trial) -> None:
    """Thirty calls with the next rows of some slots each; slots are given up and taken again.

    Elsewhere a slot was freed twice and shared by two sequences (mistral.rs#2357).
    """
    for spec in trial.first_of_kinds(("conv", "attn")):
        block, reference = trial.pair(spec)
        feeder = _Feeder(spec, block, reference, trial, slots=4)
        for _ in range(30):
            for slot in np.flatnonzero(trial.rng.random(4) < 0.1):
                feeder.restart(int(slot))
            busy = trial.rng.permutation(4)[: trial.rng.integers(1, 5)]
            feeder.feed({int(slot): int(trial.rng.integers(1, 5)) for slot in busy})
        feeder.judge("in a random schedule")


class _Feeder:
    """Feeds random rows to slots, and keeps what each sequence was fed and gave."""

    def __init__(
        self, spec: Spec, block: HostBlock, reference: HostBlock, trial: Trial, slots: int
    ) -> None:
        self.spec = spec
        self.reference = reference
        self.trial = trial
        self.session = Session(spec, block, slots, max_tokens=150)
        self.fed: dict[int, list[Float32]] = {}
        self.given: dict[int, list[Result]] = {}
        self.ended: list[tuple[list[Float32], list[Result]]] = []

    def feed(self, lengths: dict[int, int]) -> None:
        """One call with so many new rows for each of these slots."""
        rows = {s: random_rows(self.trial.rng, n, _size(self.spec)) for s, n in lengths.items()}
        results = self.session.feed(*rows.items())
        for (slot, x), result in zip(rows.items(), results, strict=True):
            self.fed.setdefault(slot, []).append(x)
            self.given.setdefault(slot, []).append(result)

    def restart(self, slot: int) -> None:
        if slot in self.fed:
            self.ended.append((self.fed.pop(slot), self.given.pop(slot)))
        self.session.restart(slot)

    def judge(self, what: str) -> None:
        """Every sequence against one call of the reference over all its rows."""
        for slot in list(self.fed):
            self.restart(slot)
        for chunks, results in self.ended:
            want = one_shot(self.spec, self.reference, np.concatenate(chunks))
            assert_close(joined(results), want, self.trial.tolerance, f"{self.spec} {what}")


def _operators(trial: Trial) -> Iterator[tuple[Spec, HostBlock, HostBlock]]:
    for spec in trial.supported(OPERATORS):
        yield spec, *trial.pair(spec)


def _size(spec: Spec) -> int:
    if isinstance(spec, specs.Layer):
        return spec.operator_norm.hidden_size
    assert isinstance(spec, specs.ShortConv | specs.Attention)
    return spec.hidden_size


def _chunks_of(length: int, total: int = 17) -> list[int]:
    return [min(length, total - start) for start in range(0, total, length)]
