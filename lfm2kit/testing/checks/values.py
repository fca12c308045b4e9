"""Every kind of block against the reference: odd sizes, and numbers of rows around tile edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from reprlib import repr as brief

import numpy as np

from lfm2kit.batch import Batch
from lfm2kit.formats import BF16, F16, F32
from lfm2kit.promises import Promise
from lfm2kit.specs import Choice, Layer, Router, Scores, ShortConv, Spec
from lfm2kit.testing.cases import CASES, REAL_WIDTHS
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_close, assert_same, rows_of
from lfm2kit.testing.host_block import host_block
from lfm2kit.testing.near_ties import NEAR_TIE, GapWatch, rows_among
from lfm2kit.testing.random_inputs import (
    first_lengths,
    first_rows,
    random_inputs,
    rows_of_first,
)
from lfm2kit.testing.random_weights import in_int8, mixtures, stored_as
from lfm2kit.testing.router_cases import WITHIN
from lfm2kit.testing.trial import Trial
from lfm2kit.weights import Weights

WITH_BIASES = [s for s in CASES["conv"] if isinstance(s, ShortConv) and s.bias]
ROWS = (0, 1, 2, 15, 16, 17, 33, 129)
RAGGED = (1, 4, 9, 2, 17, 96)  # lengths of sequences


@check
def embedding(trial: Trial) -> None:
    """The embedding's rows are the table's, bit for bit if blocks are as exact as in float32.

    Also of ids that follow each other, which are a slice of the table, and of one id again and
    again; and after a caller has written into such results.
    """
    for spec in trial.supported(CASES["embed"]):
        block, reference = trial.pair(spec)
        random = [random_inputs(spec, trial.rng, rows)[0] for rows in ROWS]
        chosen = [Batch.of_sequences([ids]) for ids in ([5, 6, 7, 8], [*range(20)], [3] * 5) * 2]
        for batch in [*random, *chosen]:
            got, want = block(batch), reference(batch)
            what = f"{spec} of ids {brief(batch.token_ids.tolist())}"
            if trial.is_exact:
                assert_same(got, want, what)
            assert_close(got, want, trial.tolerance, what)


@check
def norm(trial: Trial) -> None:
    """RMSNorm adds `delta` to `hidden`, returns the sum, and norms it in float32.

    Also without a `delta`, as before the first layer; and for rows so small that eps decides, or
    so large that squares in 16 bits would overflow.
    """
    for spec in trial.supported(CASES["norm"]):
        block, reference = trial.pair(spec)
        for rows in ROWS:
            for scale in (1e-3, 1.0, 1e3):
                hidden, delta = random_inputs(spec, trial.rng, rows, scale)
                what = f"{spec} at {rows} rows of size {scale:g}"
                got, want = block(hidden, delta), reference(hidden, delta)
                assert_close(got, want, trial.tolerance, what)
                got, want = block(hidden, None), reference(hidden, None)
                assert_close(got, want, trial.tolerance, f"{what} without delta")


@check
def short_conv(trial: Trial) -> None:
    """ShortConv over whole sequences is right for kernels of 1 to 4 taps, with and without biases.

    The batches are ragged: a sequence's first rows must see zeros before them, not the end of the
    sequence that lies before it in memory.
    """
    _judge(trial, CASES["conv"])


@check
def attention(trial: Trial) -> None:
    """Attention over whole sequences is right for groups of heads and for odd head sizes."""
    _judge(trial, CASES["attn"])


@check
def mlp(trial: Trial) -> None:
    """MLP computes w2(silu(w1 x) * w3 x)."""
    _judge(trial, CASES["mlp"])


@check
def scores(trial: Trial) -> None:
    """Scores computes sigmoid(gate(x)) in float32 in every precision."""
    _judge(trial, CASES["scores"])


@check
def choice(trial: Trial) -> None:
    """Choice gives the same experts in the same order, and their weights, for given scores."""
    _judge(trial, CASES["choice"])


@check
def router(trial: Trial) -> None:
    """Router gives the same experts in the same order, and their weights.

    Rows where the reference itself is within rounding of another choice are left out.
    """
    _judge(trial, CASES["router"])


@check
def experts(trial: Trial) -> None:
    """Experts computes the weighted sum of each row's experts."""
    _judge(trial, CASES["experts"])


@check
def sparse_moe(trial: Trial) -> None:
    """SparseMoe is right, whether built whole or joined of the backend's own parts."""
    _judge(trial, CASES["moe"])


@check
def last_rows(trial: Trial) -> None:
    """LastRows gives the wanted rows of `hidden` and `delta`, in the order they are asked for."""
    for spec in trial.supported(CASES["rows"]):
        block, reference = trial.pair(spec)
        for rows in ROWS[1:]:
            inputs = random_inputs(spec, trial.rng, rows)
            assert_same(block(*inputs), reference(*inputs), f"{spec} at {rows} rows")


@check
def last_rows_twice_or_none(trial: Trial) -> None:
    """LastRows may be asked for a row twice, for all rows once, and for no row of many.

    A rank of a parallel run may have tokens of which no logits are asked for.
    """
    for spec in trial.supported(CASES["rows"]):
        block, reference = trial.pair(spec)
        hidden, delta, batch = random_inputs(spec, trial.rng, 17)
        for wanted in ([], [16], [0, 0], [3, 16, 3, 0, 3], [*range(17)], [*range(17)] * 2):
            asked = replace(batch, logits_rows=np.array(wanted, np.int32))
            got, want = (one(hidden, delta, asked) for one in (block, reference))
            assert_same(got, want, f"{spec}, the rows {wanted} of 17")


@check
def lm_head(trial: Trial) -> None:
    """LMHead computes x @ weight.T, also for a vocabulary that no tile divides."""
    _judge(trial, CASES["head"])


@check
def layer(trial: Trial) -> None:
    """A whole layer is right with either operator and either feed-forward, also as the first."""
    _judge(trial, CASES["layer"])
    spec = trial.supported(CASES["layer"])[0]
    block, reference = trial.pair(spec)
    hidden, _, batch, _ = random_inputs(spec, trial.rng, 17)
    inputs = (hidden, None, batch, None)
    what = f"{spec} without delta, as the first layer is called"
    assert_close(block(*inputs), reference(*inputs), trial.tolerance, what)


@check
def real_widths(trial: Trial) -> None:
    """Blocks of the widths of LFM2-8B-A1B (2048, 1792, 32 experts) are right: no column is lost.

    The embedding, the last rows and the head are blocks of these widths, too.
    """
    _judge(trial, REAL_WIDTHS, rows=(1, 5))


@check
def bf16_and_f16_weights(trial: Trial) -> None:
    """Weights stored as BF16 or F16 mean their exact float32 values.

    `Tensor.data` of BF16 holds raw bits: `Tensor.float32()` is the way to read it.  The expert
    bias stays F32 in such checkpoints, and must not be rounded to the matrices' type; a
    convolution's biases are stored as its matrices are.
    """
    for spec in [*trial.first_of_kinds(), *trial.built(WITH_BIASES)]:
        for format in (BF16, F16):
            weights = stored_as(trial.random_weights(spec), format)
            _judge_weights(trial, spec, weights, (17,), f"{spec} of {format} weights")


@check
def weights_in_an_unknown_format(trial: Trial) -> None:
    """Weights in a format that the backend does not know mean what `float32()` says.

    A plugin may read quantised checkpoints: here int8 with a scale per row, norms and biases
    included.  No block may look at `Tensor.data` unless it knows the tensor's format.
    """
    for spec in [*trial.first_of_kinds(), *trial.built(WITH_BIASES)]:
        weights = in_int8(trial.random_weights(spec))
        _judge_weights(trial, spec, weights, (17,), f"{spec} of int8 weights")


@check
def weights_of_several_types(trial: Trial) -> None:
    """Each tensor is read by its own type, whatever the others of its block are stored as.

    Checkpoints keep norms and biases in F32 beside matrices in BF16, and plugins read others.  Any
    two tensors are in any two of F32, BF16, F16 and an unknown format in one of the mixtures.
    """
    for spec in [*trial.first_of_kinds(), *trial.built(WITH_BIASES)]:
        if trial.is_joined(spec):
            continue
        for mixed in mixtures(trial.random_weights(spec)):
            stored = {name: str(mixed[name].format) for name in spec.parameters()}
            _judge_weights(trial, spec, mixed, (5,), f"{spec} of weights in {stored}")


@guards(Promise.REPEATABILITY)
def weights_at_any_address(trial: Trial) -> None:
    """Weights that lie at a multiple of their elements' size, and of no more, give the same bits.

    In a file that is mapped, a tensor begins wherever the one before it ends.
    """
    for spec in [*trial.first_of_kinds(), *trial.built(WITH_BIASES)]:
        random, inputs = trial.random_weights(spec), random_inputs(spec, trial.rng, 17)
        for format in (F32, BF16, F16):
            weights = stored_as(random, format)
            skewed = host_block(trial.backend, spec, weights, is_skewed=True)
            want = trial.build(spec, weights)(*inputs)
            what = f"{spec} of {format} weights, one element beyond an aligned address"
            trial.assert_same(skewed(*inputs), want, what)


def _judge(trial: Trial, candidates: Iterable[Spec], rows: Sequence[int] = ROWS) -> None:
    for spec in trial.supported(candidates):
        _judge_weights(trial, spec, trial.random_weights(spec), rows, str(spec))


def _judge_weights(
    trial: Trial,
    spec: Spec,
    weights: Weights,
    rows: Sequence[int],
    what: str,
) -> None:
    """Call with several numbers of rows, compared where no router is near a tie.

    They are the first ones of the same rows, because no row's result depends on later ones: so the
    reference, which is slow, is called once.  A router computes in float32 in every precision, of
    what it is given: only a layer gives it what another block has rounded.
    """
    within = WITHIN if isinstance(spec, Scores | Choice | Router) else trial.tolerance
    watch = GapWatch(trial.reference)
    block, reference = trial.build(spec, weights), trial.build_reference(spec, weights, watch)
    lengths = first_lengths(RAGGED, max(rows))
    inputs = random_inputs(spec, trial.rng, max(rows), lengths=lengths)
    whole = cache(partial(reference, *inputs))
    margin = trial.near_tie if isinstance(spec, Layer) else NEAR_TIE
    for count in rows:
        got = block(*first_rows(inputs, count))
        want = rows_of(whole(), rows_of_first(spec, inputs, count))
        clear = rows_among(watch.clear_rows(margin), 0, count)
        assert_close(got, want, within, f"{what} at {count} rows", clear)
