"""Sizes beyond those of the other checks: many rows, tokens and sequences, large ids.

Kernels have tiles, tables and grids of a fixed size, and other paths for what is larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.state import Room
from lfm2kit.testing.cases import CASES, OPERATORS, WIDE_OPERATORS
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import Result, assert_close, rows_of
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_batch, random_inputs, random_rows
from lfm2kit.testing.sessions import PAGE_TOKENS, Float32, Session, joined, one_shot
from lfm2kit.testing.trial import Trial

BOTH_WIDTHS = (*OPERATORS, *WIDE_OPERATORS)
BY_ROW = ("norm", "mlp", "scores", "choice", "router", "experts", "moe", "head")

MANY = 300  # rows, tokens or sequences: more than 256, and no multiple of a tile
CROWD = 1030  # sequences: more than the largest block of threads, and no multiple of a tile
HUGE = 100_000
VOCABULARY = 70_001
LARGE_IDS = (0, 1, 32767, 32768, 65535, 65536, VOCABULARY - 1)
Vocabulary = specs.Embedding | specs.LMHead


@guards(Promise.BATCH_INVARIANCE)
def rows_among_300(trial: Trial) -> None:
    """A row among 300 has the bits that it has alone, also the first, the last and the 257th."""
    for spec in trial.supported([spec for kind in BY_ROW for spec in CASES[kind]]):
        block = trial.build(spec, trial.random_weights(spec))
        inputs = random_inputs(spec, trial.rng, MANY)
        together = block(*inputs)
        for row in (0, 255, 256, MANY - 1):
            one = slice(row, row + 1)
            alone = block(*(array[one] for array in inputs))
            trial.assert_same(
                alone, rows_of(together, one), f"{spec}: row {row} alone and among {MANY}"
            )


@guards(Promise.BATCH_INVARIANCE)
def rows_among_100000(trial: Trial) -> None:
    """A row among 100,000 has the bits that it has alone, also the 65,536th and the last.

    Grids of some devices end at 65,535, and offsets in 16 bits begin anew there.  A server's
    prefill has as many rows.
    """
    kinds = [kind for kind in (*BY_ROW, "embed", "rows") if kind != "moe"]
    for spec in trial.first_of_kinds(kinds):
        if isinstance(spec, specs.Embedding | specs.LastRows):
            _judge_huge(trial, spec)
            continue
        block = trial.build(spec, trial.random_weights(spec))
        inputs = random_inputs(spec, trial.rng, HUGE, lengths=[HUGE])
        together = block(*inputs)
        for row in (0, 65_535, 65_536, HUGE - 1):
            one = slice(row, row + 1)
            alone = block(*(array[one] for array in inputs))
            trial.assert_same(
                alone, rows_of(together, one), f"{spec}: row {row} alone and among {HUGE}"
            )


def _judge_huge(trial: Trial, spec: Spec) -> None:
    """Compare blocks that take a batch, of which no row can be taken alone."""
    block, reference = trial.pair(spec)
    inputs = random_inputs(spec, trial.rng, HUGE, lengths=[HUGE])
    assert_close(block(*inputs), reference(*inputs), trial.tolerance, f"{spec} of {HUGE} rows")


@check
def sequences_of_300_tokens(trial: Trial) -> None:
    """A sequence that is longer than a tile sees its own rows across the tiles' edges."""
    for spec in trial.supported(BOTH_WIDTHS):
        block, reference = trial.pair(spec)
        for lengths in ([MANY], [MANY - 1, 7, 140]):
            _judge_sequences(trial, spec, block, reference, lengths)


@check
def convolutions_of_3000_tokens(trial: Trial) -> None:
    """A long sequence of ShortConv sees its own rows across the edges of tiles of 1,024 and 2,048.

    The one behind it in memory does not.
    """
    for spec in trial.first_of_kinds(("conv",)):
        assert isinstance(spec, specs.ShortConv)
        _judge_sequences(trial, spec, *trial.pair(spec), [3000, 40])


def _judge_sequences(
    trial: Trial,
    spec: specs.ShortConv | specs.Attention,
    block: HostBlock,
    reference: HostBlock,
    lengths: Sequence[int],
) -> None:
    """Judge one call of an operator, without a state, for sequences of these lengths."""
    x = random_rows(trial.rng, sum(lengths), spec.hidden_size)
    inputs = x, random_batch(trial.rng, lengths), None
    what = f"{spec}, sequences of {lengths} tokens"
    assert_close(block(*inputs), reference(*inputs), trial.tolerance, what)


@guards(Promise.BATCH_INVARIANCE)
def sequences_beyond_1024(trial: Trial) -> None:
    """The last ones of 1,030 sequences have the bits of each alone, without and with a state."""
    for spec in trial.first_of_kinds(("conv", "attn")):
        assert isinstance(spec, specs.ShortConv | specs.Attention)
        block = trial.build(spec, trial.random_weights(spec))
        x = random_rows(trial.rng, CROWD, spec.hidden_size)
        together = block(x, random_batch(trial.rng, [1] * CROWD), None)
        session = Session(spec, block, trial.rng, Room(CROWD, PAGE_TOKENS))
        with_a_state = session.feed(*enumerate(x[:, None]))
        for row in (0, 1023, 1024, CROWD - 1):
            one, what = x[row : row + 1], f"{spec}: sequence {row} alone and among {CROWD}"
            trial.assert_same(together[row : row + 1], one_shot(spec, block, one), what)
            (alone,) = Session(spec, block, trial.rng).feed(("alone", one))
            trial.assert_same(with_a_state[row], alone, f"{what}, with a state")


@guards(Promise.BATCH_INVARIANCE)
def sequences_of_equal_length(trial: Trial) -> None:
    """Four sequences of one length have the bits of each alone, without and with a state.

    `lfm2kit run` sends samples of one length, for which a block may have another path than for
    ragged batches.
    """
    for spec in trial.supported(BOTH_WIDTHS):
        block = trial.build(spec, trial.random_weights(spec))
        for length in (1, 2, 5, 16, PAGE_TOKENS):
            rows = [random_rows(trial.rng, length, spec.hidden_size) for _ in range(4)]
            alone = joined([one_shot(spec, block, x) for x in rows])
            what = f"{spec}: four sequences of {length} tokens and each alone"
            batch = random_batch(trial.rng, [length] * 4)
            trial.assert_same(block(np.concatenate(rows), batch, None), alone, what)
            together = Session(spec, block, trial.rng, Room(4, PAGE_TOKENS))
            apart = [Session(spec, block, trial.rng, Room(2, PAGE_TOKENS)) for _ in rows]
            _judge_fed(trial, together, apart, rows, f"{what}, with a state")
            if length == 5:
                rows = [random_rows(trial.rng, length, spec.hidden_size) for _ in range(4)]
                _judge_fed(trial, together, apart, rows, f"{what}, the next ones")


def _judge_fed(
    trial: Trial,
    together: Session,
    apart: Sequence[Session],
    rows: Sequence[Float32],
    what: str,
) -> None:
    """Judge one call with the next rows of sequences, which are fed to states of their own, too."""
    alone = joined([one.feed((0, x))[0] for one, x in zip(apart, rows, strict=True)])
    trial.assert_same(joined(together.feed(*enumerate(rows))), alone, what)


@check
def many_sequences(trial: Trial) -> None:
    """A batch of 300 sequences, and then a step of all of them, has the reference's values.

    A launch that has places for 32 or 256 sequences must be repeated.
    """
    for spec in trial.supported(BOTH_WIDTHS):
        pair = trial.pair(spec)
        prompts = [random_rows(trial.rng, 1 + i % 2, spec.hidden_size) for i in range(MANY)]
        steps = [random_rows(trial.rng, 1, spec.hidden_size) for _ in range(MANY)]
        batch = random_batch(trial.rng, [len(x) for x in prompts])
        got, want = (joined(_fed(spec, block, prompts, steps)) for block in pair)
        assert_close(got, want, trial.tolerance, f"{spec}, {MANY} sequences and a step of them all")
        got = pair[0](np.concatenate(prompts), batch, None)
        first = rows_of(want, slice(batch.tokens))
        assert_close(got, first, trial.tolerance, f"{spec}, {MANY} sequences")


def _fed(spec: Spec, block: HostBlock, *calls: Sequence[Float32]) -> list[Result]:
    """Return the results of calls with the next rows of every sequence, in pages of one order."""
    session = Session(spec, block, np.random.default_rng(1), Room(MANY, PAGE_TOKENS))
    return [result for rows in calls for result in session.feed(*enumerate(rows))]


@check
def ids_beyond_32767(trial: Trial) -> None:
    """Ids of a vocabulary of 70,001 tokens, beyond 16 bits, work in the embedding and the head."""
    embeddings: list[Vocabulary] = [specs.Embedding(VOCABULARY, size) for size in (24, 128)]
    heads: list[Vocabulary] = [specs.LMHead(VOCABULARY, size) for size in (24, 128)]
    ids = Batch.of_sequences([LARGE_IDS])
    for spec in _first_of_each(trial.supported([*embeddings, *heads])):
        block, reference = trial.pair(spec)
        is_head = isinstance(spec, specs.LMHead)
        argument = random_rows(trial.rng, 3, spec.hidden_size) if is_head else ids
        assert_close(block(argument), reference(argument), trial.tolerance, str(spec))


def _first_of_each(built: list[Vocabulary]) -> list[Vocabulary]:
    return list({type(spec): spec for spec in reversed(built)}.values())
