"""The MLP's roles and the experts: empty ones, local ones, and the order of their sum."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import F32, ReadsRows
from lfm2kit.formats import rounded
from lfm2kit.promises import Promise
from lfm2kit.rewrites import StreamedExperts
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_close, assert_same
from lfm2kit.testing.random_inputs import random_inputs, random_rows
from lfm2kit.testing.random_weights import frozen_weights
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped
from lfm2kit.weights import Tensor, Weights


@check
def mlp_w1_is_the_gate(trial: Trial) -> None:
    """w1 is the gate (inside silu), w3 the up and w2 the down projection, also in experts.

    The gate is always below -8 here, where silu is nearly 0: swapped with w3, which is large, the
    result is a thousand times larger.  Other libraries call them gate, up and down, and at least
    one loaded them in another order (sglang#27813).
    """
    for spec in trial.first_of_kinds(("mlp", "experts")):
        assert isinstance(spec, specs.MLP | specs.Experts)
        arrays = {n: t.float32().copy() for n, t in trial.random_weights(spec).items()}
        for name, array in arrays.items():
            if name.endswith("w1.weight"):
                array[:] = -10 / spec.hidden_size
        block, reference = trial.pair(spec, trial.as_taken(frozen_weights(arrays)))
        _, *routing = random_inputs(spec, trial.rng, 17)
        x = 1 + 0.1 * random_rows(trial.rng, 17, spec.hidden_size)
        assert_close(block(x, *routing), reference(x, *routing), 10 * trial.tolerance, str(spec))


@check
def moe_empty_expert(trial: Trial) -> None:
    """Experts may get no row, one row, or every row.

    With few rows most experts are empty in every batch; a kernel launched for one must do nothing.
    Many rows of one expert may be more than a buffer of a fixed size holds.
    """
    for spec in _experts(trial):
        block, reference = trial.pair(spec)
        for ids in ([0], [spec.num_experts - 1], [1, spec.num_experts - 1]):
            for rows in (17, 300):
                x = random_rows(trial.rng, rows, spec.hidden_size)
                expert_ids = np.tile(np.array(ids, dtype=np.int32), (rows, 1))
                expert_ids[3, 0] = 2  # one expert of a single row
                weights = trial.rng.uniform(0.1, 1, expert_ids.shape).astype(np.float32)
                inputs = (x, expert_ids, weights)
                what = f"{spec}, all of {rows} rows but one to experts {ids}"
                assert_close(block(*inputs), reference(*inputs), trial.tolerance, what)


@check
def experts_of_any_number(trial: Trial) -> None:
    """A row may have more ids than `num_experts_per_tok`, those of all experts, and one id twice.

    The ids' shape counts, and the sum is over places, not over experts.
    """
    for spec in _experts(trial):
        block, reference = trial.pair(spec)
        for k in (spec.num_experts_per_tok + 1, spec.num_experts):
            for rows in (1, 17):
                x = random_rows(trial.rng, rows, spec.hidden_size)
                order = trial.rng.random((rows, spec.num_experts)).argsort(axis=1)[:, :k]
                ids = order.astype(np.int32)
                weights = trial.rng.uniform(0.1, 1, ids.shape).astype(np.float32)
                twice = ids.copy()
                twice[:, -1] = ids[:, 0]
                for some in (ids, twice):
                    what = f"{spec} at {rows} rows of {k} ids"
                    got, want = block(x, some, weights), reference(x, some, weights)
                    assert_close(got, want, trial.tolerance, what)


@check
def experts_local_ids(trial: Trial) -> None:
    """Under expert parallelism a block holds `local_experts` only, and reads no other weights.

    Ids stay those of the whole model, and local are any of them in any order: expert 4 of
    (4, 0, 2) is its first.
    """
    for spec in _experts(trial):
        for local in ((2, 3, 4), (4, 0, 2), (spec.num_experts - 1,)):
            part = replace(spec, local_experts=local)
            weights = Weights(_ReadOnly(trial.random_weights(spec), part.parameters()))
            block, reference = trial.pair(part, weights)
            for rows in (1, 17):
                inputs = random_inputs(part, trial.rng, rows)
                assert_close(block(*inputs), reference(*inputs), trial.tolerance, f"{part}")


@check
def experts_none_local(trial: Trial) -> None:
    """A rank may hold none of a layer's experts: its block then returns zeros for any ids."""
    for spec in _experts(trial):
        block = trial.build(replace(spec, local_experts=()), Weights({}))
        for rows in (0, 1, 17):
            x, others, _ = random_inputs(spec, trial.rng, rows)
            weights = np.full(others.shape, np.nan, np.float32)
            for ids in (np.full_like(others, -1), others):
                got = block(x, ids, weights)
                assert_same(got, np.zeros_like(x), f"{spec} with no local experts")
                if np.signbit(got).any():
                    raise CheckFailed(f"{spec} with no local experts: -0 instead of +0")


@check
def experts_nobody_adds_nothing(trial: Trial) -> None:
    """An id of -1 adds nothing, wherever it stands and whatever lies beside it.

    Batches are padded, exchanges of fixed capacity filled, and experts split between devices by
    it.  The weight beside it may be NaN, and so may the x of a row of -1 alone, whose result is +0.
    """
    for spec in _experts(trial):
        part = replace(spec, local_experts=spec.local_experts[::-2])
        block, reference = trial.pair(part)
        for rows in (1, 17, 129):
            x, ids, weights = random_inputs(part, trial.rng, rows)
            is_nobodys = trial.rng.random(ids.shape) < 0.4
            is_nobodys[: 1 + rows // 3] = True
            padded = np.where(is_nobodys, np.int32(-1), ids)
            want = reference(x, padded, np.where(is_nobodys, np.float32(0), weights))
            is_padding = is_nobodys.all(axis=1)
            x[is_padding] = np.nan
            got = block(x, padded, np.where(is_nobodys, np.float32(np.nan), weights))
            assert_close(got, want, trial.tolerance, f"{part} at {rows} rows, some ids -1")
            if np.any(got[is_padding]) or np.any(np.signbit(got[is_padding])):
                raise CheckFailed(f"{part} at {rows} rows: a row of -1 alone is not +0")


@guards(Promise.REPEATABILITY)
def experts_of_others_add_nothing(trial: Trial) -> None:
    """Ids of experts that another block has are as -1, to the bit.

    They lie above, below and between its own.  Where experts are split between devices, each block
    gets all ids that the router has chosen.
    """
    for spec in _experts(trial):
        ids_there = range(spec.num_experts)
        for local in (ids_there[1::2], ids_there[:0:-3], ids_there[2:3]):
            part = replace(spec, local_experts=tuple(local))
            block, reference = trial.pair(part)
            for rows in (1, 17, 129):
                x, ids, weights = random_inputs(spec, trial.rng, rows)
                is_local = np.isin(ids, local)
                x[~is_local.any(axis=1)] = np.nan
                masked = np.where(is_local, ids, np.int32(-1))
                want = block(x, masked, weights)
                assert_close(want, reference(x, masked, weights), trial.tolerance, f"{part}")
                got = block(x, ids, np.where(is_local, weights, np.float32(np.nan)))
                trial.assert_same(
                    got, want, f"{part} at {rows} rows, with ids of others and -1 for them"
                )


@guards(Promise.REPEATABILITY)
def experts_read_rounded_rows(trial: Trial) -> None:
    """Experts whose `row_format` has 16 bits give the same bits for rows that are rounded already.

    Ranks then send each other such rows.  Among them are numbers that the format cannot hold.
    """
    backend = trial.backend
    if not isinstance(backend, ReadsRows):
        raise Skipped("it has no `row_format`")
    edges = np.array([7e4, -7e4, 2**-25, 1 + 2**-8, 1 + 2**-11, -0.0], np.float32)
    narrow = [(s, f) for s in _whole_and_streamed(trial) if (f := backend.row_format(s)) != F32]
    if not narrow:
        raise Skipped("its experts read float32")
    for spec, row_format in narrow:
        block = trial.build(spec, trial.random_weights(spec))
        experts = spec if isinstance(spec, specs.Experts) else spec.experts
        for rows in (0, 1, 17, 129):
            x, ids, weights = random_inputs(experts, trial.rng, rows)
            x[::5] = np.resize(edges, x[::5].shape)
            want = block(x, ids, weights)
            got = block(rounded(x, row_format), ids, weights)
            what = f"{spec} at {rows} rows: rows in {row_format}, and as they were in float32"
            trial.assert_same(got, want, what)


@guards(Promise.REPEATABILITY)
def streamed_experts_are_their_own(trial: Trial) -> None:
    """Blocks of `StreamedExperts` share slots, and each call finds its block's own experts there.

    They are called in the order of the forward, again and again, and nobody waits between them.
    """
    for spec in _experts(trial):
        ids = range(spec.num_experts)
        layers = [tuple(some) for some in (ids[::2], ids[1::2], ids[:1], ids[::-1])]
        parts = [replace(spec, local_experts=local) for local in layers]
        for slots, each in ((1, 1), (2, 1), (2, 2)):
            streamed = [StreamedExperts(p, i, slots, each) for i, p in enumerate(parts)]
            if trial.backend.why_unsupported(streamed[0]) is not None:
                raise Skipped("it streams no experts")
            weights = [trial.random_weights(part) for part in parts]
            blocks = [trial.build(*given) for given in zip(streamed, weights, strict=True)]
            for rows in (1, 17, 129):
                inputs = random_inputs(spec, trial.rng, rows)
                moved = blocks[0].to_memory(inputs)
                results = [[b.compute(*moved) for b in blocks] for _ in range(3)]
                for i, (part, block) in enumerate(zip(parts, blocks, strict=True)):
                    what = f"{streamed[i]} at {rows} rows"
                    want = trial.build_reference(part, weights[i])(*inputs)
                    first, *others = (block.to_host(forward[i]) for forward in results)
                    assert_close(first, want, trial.tolerance, what)
                    for other in others:
                        trial.assert_same(other, first, f"{what}, called again")


@guards(Promise.SPLIT_INVARIANCE)
def experts_split_by_slot_bitwise(trial: Trial) -> None:
    """The sum over k has the same bits when each slot is computed apart and added in NumPy.

    So an expert-parallel run has the very result of a single one: each product is rounded to
    float32, and they are added in the order of k, not in the order of expert ids (vllm#45683).
    The same where some ids are -1.
    """
    for spec in trial.supported([s for s in _experts(trial) if s.num_experts_per_tok > 2]):
        block = trial.build(spec, trial.random_weights(spec))
        for rows in (1, 5, 33):
            x, ids, weights = random_inputs(spec, trial.rng, rows)
            for share in (0.0, 0.4):
                some = np.where(trial.rng.random(ids.shape) < share, np.int32(-1), ids)
                whole = block(x, some, weights)
                total = block(x, some[:, :1].copy(), weights[:, :1].copy())
                for k in range(1, ids.shape[1]):
                    one = some[:, k : k + 1].copy(), weights[:, k : k + 1].copy()
                    total = total + block(x, *one)
                trial.assert_same(
                    whole, total, f"{spec} at {rows} rows, one call and its slots added"
                )


def _whole_and_streamed(trial: Trial) -> list[specs.Experts | StreamedExperts]:
    """Return the experts that the backend builds, and those that it streams."""
    whole = _experts(trial)
    streamed = [StreamedExperts(spec, 0, 2, 1) for spec in whole]
    builds = [spec for spec in streamed if trial.backend.why_unsupported(spec) is None]
    return [*whole, *builds]


def _experts(trial: Trial) -> list[specs.Experts]:
    candidates = [spec for spec in CASES["experts"] if isinstance(spec, specs.Experts)]
    return trial.supported(candidates)


class _ForeignWeightError(CheckFailed, KeyError):
    """A KeyError too, so that `name in weights` may be asked."""

    def __str__(self) -> str:
        return f"read {self.args[0]!r}, which is not in spec.parameters()"


class _ReadOnly(Mapping[str, Tensor]):
    """Tensors of which only `names` may be read, though all are listed, as in a checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Container[str]) -> None:
        self._tensors = tensors
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise _ForeignWeightError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
