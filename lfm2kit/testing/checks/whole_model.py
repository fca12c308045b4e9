"""A whole small model through the core: placed, built, run, decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Captures
from lfm2kit.batch import Batch
from lfm2kit.memory import Array, Memory, is_ordered
from lfm2kit.model import LFM2
from lfm2kit.precisions import FP32_GRADE
from lfm2kit.promises import Promise
from lfm2kit.state import ModelState, Room
from lfm2kit.testing.cases import MODELS
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_close
from lfm2kit.testing.guards import (
    GuardedTensors,
    arrays_of_arguments,
    guarded_batch,
    require_whole_margins,
)
from lfm2kit.testing.kept_weights import as_kept
from lfm2kit.testing.near_ties import NEAR_TIE, GapWatch
from lfm2kit.testing.random_weights import frozen_weights
from lfm2kit.testing.raw_results import overwrite
from lfm2kit.testing.tiny_model import build_tiny_model, plan_for, recorded_run
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped
from lfm2kit.weights import Weights

LENGTHS = (5, 1, 8, 2)
GROWTH = 5  # how much larger than one block's an error may be after all layers
DRAWS = 50


@check
def whole_model(trial: Trial) -> None:
    """A model of four layers with every kind of block has the logits of the reference's model.

    The backend gets every block that it builds, the reference the others, arrays crossing between
    their memories.  A failure names the first block whose result is off.  Weights and batch lie
    between margins.
    """
    for spec in _models(trial):
        weights, batch, want = _without_near_ties(trial, spec)
        tensors, guarded = GuardedTensors(weights), guarded_batch(batch)
        model = build_tiny_model(spec, Weights(tensors), trial.reference, trial.backend)
        try:
            assert_close(model.logits(guarded), want, GROWTH * trial.tolerance, "logits")
            require_whole_margins(tensors.arrays(), "the model")
            require_whole_margins(arrays_of_arguments([guarded]), "the model")
        except CheckFailed as failure:
            where = _first_difference(trial, spec, weights, batch)
            raise CheckFailed(f"{failure}; the first block to differ: {where}") from None


@check
def whole_model_decodes(trial: Trial) -> None:
    """Prefill, then one token at a time, gives the logits of one forward over all tokens.

    A backend that captures forwards replays these steps: with the state, positions and pages of
    each.
    """
    for spec in _models(trial):
        weights, batch, want = _without_near_ties(trial, spec)
        model = build_tiny_model(spec, weights, trial.reference, trial.backend)
        pages = [[3], [0], [4], [1]]
        state = model.new_state(Room(5, 64))
        ids = _sequences(batch)
        seen = [(len(one) + 1) // 2 for one in ids]
        prompts = [one[:n] for one, n in zip(ids, seen, strict=True)]
        got = model.logits(Batch.of_sequences(prompts, pages=pages), state).copy()
        while left := [i for i, one in enumerate(ids) if seen[i] < len(one)]:
            step = Batch.of_sequences(
                [ids[i][seen[i] : seen[i] + 1] for i in left],
                starts=[seen[i] for i in left],
                pages=[pages[i] for i in left],
            )
            got[left] = model.logits(step, state)
            for i in left:
                seen[i] += 1
        assert_close(got, want, GROWTH * trial.tolerance, "logits of the last tokens")
        whole = model.logits(batch)  # of the same roundings, in 16 bits as well
        has_bits = trial.promises(Promise.CHUNK_INVARIANCE)
        within = GROWTH * (FP32_GRADE.block_error if has_bits else 2 * trial.tolerance)
        assert_close(got, whole, within, "logits of the last tokens and of one forward")


@guards(Promise.BATCH_INVARIANCE)
def whole_model_batch_independence(trial: Trial) -> None:
    """A sequence's logits have the same bits alone, in a batch, and in a permuted batch."""
    for spec in _models(trial):
        weights, batch = _random_model(trial, spec)
        model = build_tiny_model(spec, weights, trial.reference, trial.backend)
        ids = _sequences(batch)
        together = model.logits(Batch.of_sequences(ids)).copy()
        for i, one in enumerate(ids):
            alone = model.logits(Batch.of_sequences([one]))[0]
            trial.assert_same(
                alone, together[i], f"logits of {len(one)} tokens, alone and in a batch", GROWTH
            )
        order = trial.rng.permutation(len(ids))
        permuted = model.logits(Batch.of_sequences([ids[i] for i in order]))
        trial.assert_same(permuted, together[order], "logits of a permuted batch", GROWTH)


@guards(Promise.REPEATABILITY)
def captured_forward(trial: Trial) -> None:
    """A captured forward has the bits of the plain one, whatever batches of its form preceded it.

    A replay with the first batch's ids, lengths or rows in it looks right as long as the same batch
    comes.
    """
    for spec, model in _captured_models(trial):
        forms = ((5, 1, 8, 2), (2, 8, 5, 1), (8, 1, 1, 6))  # 16 tokens, the longest of 8
        batches = [_random_batch(trial, spec, lengths) for lengths in forms]
        wanted = batches[0].logits_rows[::-1].copy()
        batches.insert(1, replace(batches[0], logits_rows=wanted))
        assert len({batch.form for batch in batches}) == 1
        for batch in batches * 2:
            plain = _plain(model, batch)
            trial.assert_same(model.logits(batch), plain, "logits of a captured forward", GROWTH)
        assert isinstance(trial.backend, Captures)
        replay = trial.backend.capture(model.forward, batches[0])
        if type(replay.nbytes) is not int or replay.nbytes < 0:
            raise CheckFailed(f"a replay's nbytes is {replay.nbytes!r}")
        replay.close()


@guards(Promise.REPEATABILITY)
def replays_do_not_disturb_each_other(trial: Trial) -> None:
    """A replay's logits are the caller's own, and one that is closed leaves the others whole.

    Two forms of as many tokens and sequences, with other rows wanted, are replayed in turn.  Their
    logits are read after all of them.
    """
    for spec, model in _captured_models(trial):
        backend = trial.backend
        assert isinstance(backend, Captures)
        some, others = (
            [_random_batch(trial, spec, lengths) for _ in range(3)]
            for lengths in ((5, 1, 8, 2), (4, 4, 4, 4))
        )
        others = [replace(b, logits_rows=np.arange(9, dtype=np.int32)) for b in others]
        batches = [batch for pair in zip(some, others, strict=True) for batch in pair]
        wanted = [_plain(model, batch) for batch in batches]
        with model.running():
            pair = [backend.capture(model.forward, batch) for batch in batches[:2]]
            logits = [pair[i % 2](batch) for i, batch in enumerate(batches)]
            for got, want in zip(logits, wanted, strict=True):
                trial.assert_same(
                    _here(model, got), want, "logits of a replay after later ones", GROWTH
                )
            for got in logits:
                overwrite(got)
            pair[0].close()
            found = [_here(model, pair[1](batch)) for batch in others]
            for got, want in zip(found, wanted[1::2], strict=True):
                trial.assert_same(
                    got, want, "logits of a replay after another one was closed", GROWTH
                )
            pair[1].close()


def _plain(model: LFM2, batch: Batch) -> npt.NDArray[np.float32]:
    with model.running():
        return _here(model, model.forward(batch.on(model.home)))


def _here(model: LFM2, logits: Array) -> npt.NDArray[np.float32]:
    return np.array(model.home.to_host(logits))


@guards(Promise.REPEATABILITY)
def captured_steps(trial: Trial) -> None:
    """Captured decoding steps have the bits of plain ones: positions, pages and states differ.

    Two states take turns, sequences change places and pages, and a step back is replayed, too.
    """
    for spec, model in _captured_models(trial):
        captured, plain = ([model.new_state(Room(6, 64)) for _ in range(2)] for _ in range(2))
        vocab = spec.embed_tokens.vocab_size
        seen = [[5, 2, 62], [1, 9, 3]]
        tables = [[[4, -1], [1, -1], [0, 3]], [[2, -1], [3, -1], [5, -1]]]
        for turn in range(12):
            for which in (0, 1):
                lengths = seen[which] if turn == 0 else [1, 1, 1]
                starts = [0, 0, 0] if turn == 0 else seen[which]
                order = list(trial.rng.permutation(3))
                batch = Batch.of_sequences(
                    [trial.rng.integers(vocab, size=lengths[i]) for i in order],
                    starts=[starts[i] for i in order],
                    pages=[tables[which][i] for i in order],
                )
                want = _plain_step(model, batch, plain[which])
                what = f"logits of captured step {turn} of state {which}"
                trial.assert_same(model.logits(batch, captured[which]), want, what, GROWTH)
                if turn:
                    back = 3 if turn == 6 else 0
                    seen[which] = [n + 1 - back for n in seen[which]]


@guards(Promise.REPEATABILITY)
def steps_begun_ahead(trial: Trial) -> None:
    """Steps whose ids are in the backend's memory have the bits of steps that are told them.

    They are begun one after the other, and read afterwards.
    """
    for spec, model in _captured_models(trial):
        state, plain = (model.new_state(Room(6, 64)) for _ in range(2))
        lengths, pages = [5, 2, 62], [[4, -1], [1, -1], [0, 3]]
        vocab = spec.embed_tokens.vocab_size
        prompts = [trial.rng.integers(vocab, size=n) for n in lengths]
        prefill = Batch.of_sequences(prompts, pages=pages)
        model.logits(prefill, state)
        _plain_step(model, prefill, plain)
        begun, wanted = [], []
        for turn in range(8):
            ids, others = trial.rng.integers(vocab, size=(2, 3, 1)).astype(np.int32)
            starts = [n + turn for n in lengths]
            told, left = (
                Batch.of_sequences(list(one), starts=starts, pages=pages) for one in (ids, others)
            )
            wanted.append(_plain_step(model, told, plain))
            if turn < 2:  # the first of its form, and the one that is captured
                trial.assert_same(
                    model.logits(told, state), wanted.pop(), "logits of a plain step", GROWTH
                )
                continue
            if not model.takes_ids(left, state):
                raise Skipped("its replays take no ids of its memory")
            there = model.home.from_host(ids.reshape(-1))
            with model.logits_at_home(left, state, there) as logits:
                begun.append((there, _reading(model.home, logits)))
        for i, ((_, read), want) in enumerate(zip(begun, wanted, strict=True)):
            trial.assert_same(read(), want, f"logits of step {i}", GROWTH)


def _reading(memory: Memory, array: Array) -> Callable[[], npt.NDArray[Any]]:
    """Return what reads an array that may still be computed in the current stream."""
    if is_ordered(memory):
        return memory.start_to_host(array).wait
    return lambda: memory.to_host(array)


def _plain_step(model: LFM2, batch: Batch, state: ModelState) -> npt.NDArray[np.float32]:
    with model.running():
        return np.array(model.home.to_host(model.forward(batch.on(model.home), state.layers)))


def _random_model(trial: Trial, spec: specs.Model) -> tuple[Weights, Batch]:
    """Return weights and a batch; no router is near a tie where other roundings are allowed."""
    if trial.is_strict:
        return trial.random_weights(spec), _random_batch(trial, spec)
    return _without_near_ties(trial, spec)[:2]


def _captured_models(trial: Trial) -> Iterator[tuple[specs.Model, LFM2]]:
    """Yield the models whose forwards the backend captures; raise `Skipped` if there is none."""
    if not isinstance(trial.backend, Captures):
        raise Skipped("it captures no forward")
    for spec in _models(trial):
        weights, _ = _random_model(trial, spec)
        model = build_tiny_model(spec, weights, trial.reference, trial.backend)
        if not model.placed.is_capturable or model.backend is not trial.backend:
            parts = "it does not build the whole of a model in one memory, or crosses others"
            raise Skipped(next(model.placed.objections(), parts))
        yield spec, model


def _models(trial: Trial) -> list[specs.Model]:
    """Return the models in which the backend has a block."""
    models = [m for m in MODELS if plan_for(m, trial.backend).backends() != {"reference"}]
    if not models:
        raise Skipped("it builds no block of the tiny models")
    return models


def _without_near_ties(
    trial: Trial, spec: specs.Model
) -> tuple[Weights, Batch, npt.NDArray[np.float32]]:
    """Return weights, a batch and the reference's logits, no router being near a tie.

    In 16 bits some row would always be near one: there the biases decide.
    """
    for _ in range(DRAWS):
        weights, batch = trial.random_weights(spec), _random_batch(trial, spec)
        if trial.near_tie > NEAR_TIE:
            weights = _decided_by_biases(trial, weights)
        watch = GapWatch(trial.reference)
        logits = build_tiny_model(*_as_kept(trial, spec, weights), watch, None).logits(batch)
        if all(np.all(gaps > 10 * trial.near_tie) for gaps in watch.gaps):
            return weights, batch, logits.copy()
    raise Skipped(f"in {DRAWS} draws a router was always near a tie in {trial.precision.name}")


def _as_kept(trial: Trial, spec: specs.Model, weights: Weights) -> tuple[specs.Model, Weights]:
    """Return the model and its weights with the values that the backend keeps.

    The head has a matrix of its own: a backend may keep that of the embedding in another format.
    """
    shared = weights["embed_tokens.weight"]
    untied = replace(spec, tie_word_embeddings=False)
    apart = Weights({"lm_head.weight": shared, **weights})
    return untied, as_kept(trial.backend, untied, apart)


def _decided_by_biases(trial: Trial, weights: Weights) -> Weights:
    """Return the weights with biases so far apart that no error of a score turns a choice round."""
    step = 1 + 20 * trial.near_tie  # scores are between 0 and 1

    def biases(count: int) -> npt.NDArray[np.float32]:
        return (step * trial.rng.permutation(count)).astype(np.float32)

    biased = {n: biases(t.size) for n, t in weights.items() if n.endswith("expert_bias")}
    return Weights({**weights, **frozen_weights(biased)})


def _random_batch(trial: Trial, spec: specs.Model, lengths: Sequence[int] = LENGTHS) -> Batch:
    vocab = spec.embed_tokens.vocab_size
    return Batch.of_sequences([trial.rng.integers(vocab, size=n) for n in lengths])


def _sequences(batch: Batch) -> list[Any]:
    return np.split(batch.token_ids, batch.cu_seqlens[1:-1])


def _first_difference(trial: Trial, spec: specs.Model, weights: Weights, batch: Batch) -> str:
    got = recorded_run(spec, weights, trial.reference, trial.backend, batch)
    want = recorded_run(*_as_kept(trial, spec, weights), trial.reference, None, batch)
    for name in (n for n in got if n in want):
        within = 5 * trial.tolerance
        try:
            assert_close(got[name], want[name], within, name)
        except CheckFailed as failure:
            return str(failure)
    return "none, where every block is called alone"
