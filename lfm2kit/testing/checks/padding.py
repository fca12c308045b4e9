"""Padding rows, for backends whose blocks take them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import PADDING, TakesPadding
from lfm2kit.batch import Batch
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.state import Room
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import guards
from lfm2kit.testing.checks.state import OPERATORS
from lfm2kit.testing.compare import each
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_rows
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped

LENGTHS, TABLE = [5, 2, 55], [[4, -1], [1, -1], [5, 0]]  # NumPy takes page -1 for 5
ROWS = 8  # of a step, with padding


@guards(Promise.BATCH_INVARIANCE)
def padding_rows(trial: Trial) -> None:
    """Padding rows change no bit of other rows and no page, and hold finite numbers.

    An embedding returns zeros in them, whatever their ids.
    """
    if not isinstance(trial.backend, TakesPadding):
        raise Skipped("its blocks take no padding rows")
    for spec in trial.supported((*CASES["embed"], *OPERATORS)):
        if not trial.backend.takes_padding(spec):
            continue
        block = trial.build(spec, trial.random_weights(spec))
        if isinstance(spec, specs.Embedding):
            _check_embedding(trial, spec, block)
        else:
            _check_operator(trial, spec, block)


def _check_embedding(trial: Trial, spec: specs.Embedding, block: HostBlock) -> None:
    batch = Batch.of_sequences([trial.rng.integers(spec.vocab_size, size=n) for n in (1, 3)])
    padded = batch.padded(ROWS)
    is_padding = padded.positions == PADDING
    garbage = np.where(is_padding, np.int32(2**31 - 1), padded.token_ids)
    got = block(padded.unchecked(token_ids=garbage))
    trial.assert_same(got[~is_padding], block(batch), f"{spec}, beside padding rows")
    if got[is_padding].any():
        raise CheckFailed(f"{spec}: padding rows are not zeros")


def _check_operator(trial: Trial, spec: Spec, block: HostBlock) -> None:
    """Feed two states, one of them with padding; a page that it spoilt would show in a later step.

    Steps are of one row for each sequence, of a few, and of more than a sequence can go back.
    """
    plain, padded = (block.new_state(Room(6, 64)) for _ in range(2))
    starts = np.zeros(len(LENGTHS), np.int32)
    for lengths in (LENGTHS, [1, 1, 1], [2, 17, 1], [1, 1, 1]):
        ids = [np.zeros(n, np.int32) for n in lengths]
        batch = Batch.of_sequences(ids, starts=starts.tolist(), pages=TABLE)
        more = batch.padded(batch.tokens + ROWS - len(LENGTHS))
        x = random_rows(trial.rng, more.tokens, _size(spec))
        want = _called(spec, block, x[: batch.tokens], batch, plain)
        for array, wanted in zip(_called(spec, block, x, more, padded), want, strict=True):
            what = f"{spec}, chunks of {lengths} rows beside padding rows"
            trial.assert_same(array[: batch.tokens], wanted, what)
            if not np.isfinite(array[batch.tokens :]).all():
                raise CheckFailed(f"{spec}: padding rows are not finite")
        starts += np.array(lengths, np.int32)


def _called(
    spec: Spec, block: HostBlock, x: npt.NDArray[np.float32], batch: Batch, state: object
) -> list[npt.NDArray[np.float32]]:
    inputs = (x, None) if isinstance(spec, specs.Layer) else (x,)
    return list(each(block(*inputs, batch, state)))


def _size(spec: Spec) -> int:
    operator = spec.operator if isinstance(spec, specs.Layer) else spec
    return int(operator.hidden_size)  # type: ignore[attr-defined]
