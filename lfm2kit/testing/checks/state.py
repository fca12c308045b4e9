"""The operators' state, in chunks, decoding and pages: where LFM2 in batches goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import HOST, BuildsOperators
from lfm2kit.batch import Batch
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.state import STEP_BACK, Room
from lfm2kit.testing import cases
from lfm2kit.testing.allocations import traced_array_bytes, tracing
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import Result, assert_close, rows_of
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_rows
from lfm2kit.testing.sessions import PAGE_TOKENS, Float32, Session, joined, one_shot
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed

DENSE_LAYERS = tuple(
    spec
    for spec in CASES["layer"]
    if isinstance(spec, specs.Layer) and isinstance(spec.feed_forward, specs.MLP)
)
OPERATORS: tuple[Spec, ...] = (*CASES["conv"], *CASES["attn"], *DENSE_LAYERS)

BEYOND_A_PAGE = PAGE_TOKENS + 7
SLACK = 4096  # bytes that a state may take beyond what is said, for alignment


@check
def operator_has_state(trial: Trial) -> None:
    """Blocks of operators and layers have `new_state`, and `state_bytes` gives at least its bytes.

    `state_bytes` is what `lfm2kit plan` and a server's admission count with, before building.  On
    the host it is compared with what `new_state` allocates.
    """
    for spec in trial.supported(OPERATORS):
        block = trial.build(spec, trial.random_weights(spec))
        if not callable(getattr(block.block, "new_state", None)):
            raise CheckFailed(f"{spec}: the block has no method new_state")
        rooms = [Room(0), Room(1, 64), Room(1, 128), Room(3, 128), Room(3, 1024), Room(64, 1024)]
        made = [_bytes_made(block, room) for room in rooms]
        if trial.is_joined(spec):
            continue
        if not isinstance(trial.backend, BuildsOperators):
            raise CheckFailed(f"{spec}: the backend has no method state_bytes")
        sizes = [trial.backend.state_bytes(spec, room) for room in rooms]
        least = [max(_least_bytes(spec, r), n) for r, n in zip(rooms, made, strict=True)]
        is_enough = all(a >= 0.99 * b - SLACK for a, b in zip(sizes, least, strict=True))
        if any(type(size) is not int for size in sizes) or sizes != sorted(sizes) or not is_enough:
            raise CheckFailed(f"{spec}: state_bytes of growing rooms: {sizes}; at least {least}")


def _bytes_made(block: HostBlock, room: Room) -> int:
    """Return the bytes of the NumPy arrays that `new_state` makes; 0 in other memories."""
    if block.memory.name != HOST.name:
        block.new_state(room)
        return 0
    with tracing():
        before = traced_array_bytes()
        state = block.new_state(room)
        made = traced_array_bytes() - before
        del state
    return made


def _least_bytes(spec: Spec, room: Room) -> int:
    """Return what a state takes if its elements have 16 bits."""
    if isinstance(spec, specs.Layer):
        return _least_bytes(spec.operator, room)
    if isinstance(spec, specs.ShortConv):
        return 2 * room.pages * (spec.kernel_size - 1 + STEP_BACK) * spec.hidden_size
    assert isinstance(spec, specs.Attention)
    return 4 * room.pages * room.page_tokens * spec.num_key_value_heads * spec.head_dim


@check
def state_fresh_at_position_zero(trial: Trial) -> None:
    """A sequence at position 0 starts afresh, whatever its pages hold: another's rows, or NaN.

    Also where it is shorter than the kernel and goes on: the missing rows are zeros, not the
    former sequence's.
    """
    for spec, block, reference in _operators(trial):
        x = random_rows(trial.rng, 6, _size(spec))
        want = one_shot(spec, reference, x)
        for garbage in (np.full((70, _size(spec)), np.nan, np.float32), _rows(trial, spec, 70)):
            for lengths in ([6], [1, 1, 1, 1, 1, 1], [2, 4]):
                session = Session(spec, block, trial.rng, Room(2, PAGE_TOKENS))
                session.feed(("former", garbage))
                session.pages.drop("former")
                got = session.feed_in_chunks("new", x, lengths)
                what = f"{spec}, chunks of {lengths} in used pages"
                assert_close(got, want, trial.tolerance, what)


@guards(Promise.CHUNK_INVARIANCE)
def state_chunked_equals_one_shot(trial: Trial) -> None:
    """A sequence in chunks of 1, 2, 3, 5, 16 has the bits of one call, also beyond a page.

    Chunks shorter than the kernel must keep the older rows of the state (vllm#56196); pages of
    exactly the sequence's length must do.
    """
    for spec, block, reference in _operators(trial):
        x = _rows(trial, spec, BEYOND_A_PAGE)
        want = one_shot(spec, block, x)
        assert_close(want, one_shot(spec, reference, x), trial.tolerance, f"{spec} in one call")
        for lengths in (*map(_chunks_of, (1, 2, 3, 5, 16)), [PAGE_TOKENS, 7], [1, 70], [70, 1]):
            session = Session(spec, block, trial.rng, Room(2, PAGE_TOKENS))
            got = session.feed_in_chunks("one", x, lengths)
            trial.assert_same(got, want, f"{spec} in chunks of {lengths}")


@guards(Promise.CHUNK_INVARIANCE)
def state_page_sizes(trial: Trial) -> None:
    """The size of pages changes no bit."""
    for spec, block, _ in _operators(trial):
        x = _rows(trial, spec, 150)
        want = one_shot(spec, block, x)
        for page_tokens in (64, 128, 192):
            session = Session(spec, block, trial.rng, Room(5, page_tokens))
            got = session.feed_in_chunks("one", x, [60, 1, 3, 70, 16])
            trial.assert_same(got, want, f"{spec} in pages of {page_tokens} tokens")


@check
def state_decode_batch(trial: Trial) -> None:
    """Several sequences decode one token each per call, in any order, in pages of any order.

    A batch of sequences of length 1 is where strides and broadcasts are misread
    (mistral.rs#2357).
    """
    prompts = {"a": 5, "b": 1, "c": 9, "d": PAGE_TOKENS - 2}
    for spec, block, reference in _operators(trial):
        feeder = _Feeder(spec, block, reference, trial)
        feeder.feed(prompts)
        for _ in range(4):
            feeder.feed({str(name): 1 for name in trial.rng.permutation(list(prompts))})
        feeder.judge("decoded in batches")


@check
def state_prefill_beside_decode(trial: Trial) -> None:
    """One call may hold one sequence's first tokens, another's next one, and a chunk of a third."""
    for spec, block, reference in _operators(trial):
        feeder = _Feeder(spec, block, reference, trial)
        for lengths in (
            {"d": 7, "b": 2},
            {"a": 4, "d": 1, "b": 2},
            {"b": 1, "d": 3, "a": 1},
            {"c": 1, "a": BEYOND_A_PAGE},
            {"a": 1, "c": 70, "d": 1},
        ):
            feeder.feed(lengths)
        feeder.judge("in mixed batches")


@guards(Promise.REPEATABILITY)
def state_pages_do_not_leak(trial: Trial) -> None:
    """What other sequences are fed, even NaN, changes no bit of a sequence's results."""
    for spec, block, _ in _operators(trial):
        x = _rows(trial, spec, BEYOND_A_PAGE)
        between = [_rows(trial, spec, len(x)), np.full_like(x, np.nan)]
        of_values, of_nan = (
            # As many pages as are needed: each has a neighbour of another sequence.
            _fed_between(Session(spec, block, np.random.default_rng(1), Room(6, PAGE_TOKENS)), x, y)
            for y in between
        )
        trial.assert_same(of_nan, of_values, f"{spec}, between sequences of NaN and of values")


def _fed_between(session: Session, x: Float32, others: Float32) -> Result:
    """Return the results of `x`, fed in chunks with another sequence before and one after it.

    The two change places: the last one to write a place is the one whose values stay.
    """
    parts = []
    for i, (start, end) in enumerate(pairwise((0, 3, 4, 62, 65, len(x)))):
        rows = slice(start, end)
        first, last = ("a", "c") if i % 2 else ("c", "a")
        parts.append(session.feed((first, others[rows]), ("b", x[rows]), (last, others[rows]))[1])
    return joined(parts)


@guards(Promise.CHUNK_INVARIANCE)
def state_forks_share_pages(trial: Trial) -> None:
    """Two sequences that share the whole pages of a beginning equal two separate ones."""
    for spec, block, _ in _operators(trial):
        beginning = _rows(trial, spec, BEYOND_A_PAGE)
        session = Session(spec, block, trial.rng)
        session.feed(("one", beginning))
        whole = session.pages.fork("other", "one")
        ends = {name: _rows(trial, spec, 9) for name in ("one", "other")}
        results: dict[str, list[Result]] = {"one": [], "other": []}
        for a, b in pairwise((0, 1, 4, 5, 9)):
            fed = session.feed(*((name, x[a:b]) for name, x in ends.items()))
            for name, result in zip(ends, fed, strict=True):
                results[name].append(result)
        for name, before in (("one", beginning), ("other", beginning[:whole])):
            want = one_shot(spec, block, np.concatenate([before, ends[name]]))
            got = joined(results[name])
            trial.assert_same(
                got, rows_of(want, slice(len(before), None)), f"{spec}, fork '{name}'"
            )


@guards(Promise.CHUNK_INVARIANCE)
def state_steps_back(trial: Trial) -> None:
    """A sequence may take back up to 16 tokens, and go on with others, across a page's end too."""
    for spec, block, _ in _operators(trial):
        for fed, back in ((20, 1), (20, 5), (40, STEP_BACK), (66, 9), (70, 6), (80, STEP_BACK)):
            x, y = _rows(trial, spec, fed), _rows(trial, spec, 20)
            whole = one_shot(spec, block, np.concatenate([x[: fed - back], y]))
            want = rows_of(whole, slice(fed - back, None))
            for lengths in ([1] * 8 + [12], [3, 3, 14], [20]):
                session = Session(spec, block, trial.rng, Room(3, PAGE_TOKENS))
                session.feed(("one", x))
                session.pages.step_back("one", back)
                got = session.feed_in_chunks("one", y, lengths)
                what = f"{spec}, {back} tokens back from {fed}, then chunks of {lengths}"
                trial.assert_same(got, want, what)


@check
def state_positions_beyond_32768(trial: Trial) -> None:
    """Positions above 32,768, in page tables of more than 512 columns, are read right.

    Every column names one page, so that no forward over all those tokens is needed.  One attention
    goes on from 131,072, beyond the release's context.
    """
    built = trial.supported((*cases.OPERATORS, *cases.WIDE_OPERATORS, *DENSE_LAYERS))
    for spec in built:
        if not trial.is_joined(spec):
            _judge_far(trial, spec, 32_768, 2)
    for spec in [spec for spec in built if spec.kind == "attn"][:1]:
        _judge_far(trial, spec, 131_072, 1)


def _judge_far(trial: Trial, spec: Spec, position: int, count: int) -> None:
    """Compare a chunk of some rows at a position, behind many equal pages."""
    columns = position // PAGE_TOKENS
    beginning, x = _rows(trial, spec, PAGE_TOKENS), _rows(trial, spec, count)
    results = []
    for block in trial.pair(spec):
        state = block.new_state(Room(3, PAGE_TOKENS))
        for start, pages, rows in ((0, [2], beginning), (position, [2] * columns + [1], x)):
            ids = np.zeros(len(rows), np.int32)
            batch = Batch.of_sequences([ids], starts=[start], pages=[pages])
            results.append(block(*_arguments(spec, rows), batch, state))
    _, got, _, want = results
    # Equal pages make the roundings of sums over 32,768 keys equal, too: they do not cancel.
    assert_close(got, want, 4 * trial.tolerance, f"{spec} at position {position}")


@guards(Promise.CHUNK_INVARIANCE)
def state_decode_after_600_tokens(trial: Trial) -> None:
    """Steps after 600 tokens have the bits of one call over all of them.

    Attention over a long context is computed in parts, whose maxima and sums differ.
    """
    for spec in trial.supported((*cases.OPERATORS, *cases.WIDE_OPERATORS)):
        block, reference = trial.pair(spec)
        x = _rows(trial, spec, 603)
        session = Session(spec, block, trial.rng)
        got = session.feed_in_chunks("one", x, [600, 1, 2])
        trial.assert_same(got, one_shot(spec, block, x), f"{spec}, 600 tokens, then a step")
        want = one_shot(spec, reference, x)
        assert_close(got, want, trial.tolerance, f"{spec}, 600 tokens, then a step")


@guards(Promise.CHUNK_INVARIANCE)
def state_belongs_to_its_caller(trial: Trial) -> None:
    """A block keeps nothing of its own: two states of one block do not know each other.

    Nor do states of two blocks of one spec, as two layers are.  Nor does a call without a state,
    made between theirs, of one row, of a few, or of more than a page holds.
    """
    for spec, block, _ in _operators(trial):
        twin = trial.build(spec, trial.random_weights(spec))
        blocks = (block, block, twin)
        # The generators are alike, so that all have the same pages.
        sessions = [Session(spec, one, np.random.default_rng(2)) for one in blocks]
        rows = [_rows(trial, spec, 9) for _ in blocks]
        parts: list[list[Result]] = [[] for _ in blocks]
        between = _rows(trial, spec, BEYOND_A_PAGE)
        for (a, b), count in zip(pairwise((0, 3, 4, 9)), (BEYOND_A_PAGE, 1, 5), strict=True):
            for session, x, part in zip(sessions, rows, parts, strict=True):
                part.append(session.feed(("s", x[a:b]))[0])
                one_shot(spec, block, between[:count])
        for one, x, part in zip(blocks, rows, parts, strict=True):
            trial.assert_same(joined(part), one_shot(spec, one, x), f"{spec} with two states")


@guards(Promise.CHUNK_INVARIANCE)
def state_of_an_empty_batch(trial: Trial) -> None:
    """A call without any sequence is possible with a state too, and changes nothing.

    Its page table may have columns, which hold no page.
    """
    for spec, block, _ in _operators(trial):
        session = Session(spec, block, trial.rng)
        x = _rows(trial, spec, 8)
        parts = [session.feed(("one", x[:5]))[0]]
        for columns, rows in ((0, x[5:7]), (2, x[7:])):
            session.feed_nothing(columns)
            parts.append(session.feed(("one", rows))[0])
        want = one_shot(spec, block, x)
        trial.assert_same(joined(parts), want, f"{spec}, an empty batch between two chunks")


@check
def state_random_schedule(trial: Trial) -> None:
    """Sequences that start, end, fork and step back at random in forty calls have right values.

    Elsewhere a sequence's room was freed twice and shared by two (mistral.rs#2357).
    """
    for spec in trial.first_of_kinds(("conv", "attn")):
        block, reference = trial.pair(spec)
        feeder = _Feeder(spec, block, reference, trial)
        for _ in range(40):
            for name in [n for n in feeder.fed if trial.rng.random() < 0.1]:
                feeder.end(name)
            busy = trial.rng.permutation(4)[: trial.rng.integers(1, 5)]
            feeder.feed({f"s{i}": int(trial.rng.choice([1, 2, 4, 30])) for i in busy})
        feeder.judge("in a random schedule")


class _Feeder:
    """A feeder of random rows to sequences, which keeps what each was fed and gave."""

    def __init__(self, spec: Spec, block: HostBlock, reference: HostBlock, trial: Trial) -> None:
        self.spec = spec
        self.reference = reference
        self.trial = trial
        self.session = Session(spec, block, trial.rng, Room(40, PAGE_TOKENS))
        self.fed: dict[str, list[Float32]] = {}
        self.given: dict[str, list[Result]] = {}
        self.ended: list[tuple[list[Float32], list[Result]]] = []

    def feed(self, lengths: dict[str, int]) -> None:
        """Make one call with this number of new rows for each of these sequences."""
        rows = {name: _rows(self.trial, self.spec, n) for name, n in lengths.items()}
        results = self.session.feed(*rows.items())
        for (name, x), result in zip(rows.items(), results, strict=True):
            self.fed.setdefault(name, []).append(x)
            self.given.setdefault(name, []).append(result)

    def end(self, name: str) -> None:
        self.ended.append((self.fed.pop(name), self.given.pop(name)))
        self.session.pages.drop(name)

    def judge(self, what: str) -> None:
        """Compare every sequence with one call of the reference over all its rows."""
        for name in list(self.fed):
            self.end(name)
        for chunks, results in self.ended:
            want = one_shot(self.spec, self.reference, np.concatenate(chunks))
            assert_close(joined(results), want, self.trial.tolerance, f"{self.spec} {what}")


def _operators(trial: Trial) -> Iterator[tuple[Spec, HostBlock, HostBlock]]:
    """Yield operators, and layers that are built whole, with the reference's block."""
    for spec in trial.supported(OPERATORS):
        if not trial.is_joined(spec):
            yield spec, *trial.pair(spec)


def _rows(trial: Trial, spec: Spec, count: int) -> Float32:
    return random_rows(trial.rng, count, _size(spec))


def _arguments(spec: Spec, x: Float32) -> tuple[Any, ...]:
    return (x, None) if isinstance(spec, specs.Layer) else (x,)


def _size(spec: Spec) -> int:
    if isinstance(spec, specs.Layer):
        return spec.operator_norm.hidden_size
    assert isinstance(spec, specs.ShortConv | specs.Attention)
    return spec.hidden_size


def _chunks_of(length: int) -> list[int]:
    """Return chunks of a length, but for one in the middle of the page, far from its edges."""
    before, behind = [length] * min(8, 30 // length), [length] * (16 // length)
    middle = BEYOND_A_PAGE - sum(before) - sum(behind)
    return [*before, middle, *behind]
