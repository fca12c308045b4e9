"""Random arguments for a block of any kind: ragged batches, hidden rows, routings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.specs import Spec

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


def random_rows(rng: np.random.Generator, rows: int, size: int, scale: float = 1.0) -> Float32:
    """Return float32 [rows, size], N(0, scale)."""
    values = rng.standard_normal((rows, size), dtype=np.float32)
    return values if scale == 1 else values * np.float32(scale)


def random_lengths(rng: np.random.Generator, rows: int) -> list[int]:
    """Return the lengths of some sequences, `rows` in all."""
    if rows == 0:
        return []
    cuts = rng.choice(np.arange(1, rows), size=min(3, rows - 1), replace=False)
    return [int(n) for n in np.diff([0, *sorted(cuts), rows])]


def random_batch(
    rng: np.random.Generator,
    lengths: Sequence[int],
    *,
    vocab_size: int = 10,
) -> Batch:
    """Return a ragged batch of sequences of these lengths."""
    ids = [rng.integers(vocab_size, size=n) for n in lengths]
    return Batch.of_sequences(ids)


def random_scores(
    rng: np.random.Generator, rows: int, num_experts: int, scale: float = 1.0
) -> Float32:
    """Return float32 [rows, num_experts]: the sigmoids of N(0, scale)."""
    logits = scale * rng.standard_normal((rows, num_experts))
    return (1 / (1 + np.exp(-np.clip(logits, -700, 700)))).astype(np.float32)


def random_routing(
    rng: np.random.Generator, spec: specs.Experts, rows: int
) -> tuple[Int32, Float32]:
    """Return (expert_ids, expert_weights), each row's ids distinct and local."""
    local = np.array(spec.local_experts, np.int32)
    k = min(spec.num_experts_per_tok, len(local))
    order = rng.random((rows, len(local))).argsort(axis=1)[:, :k]
    return local[order], rng.uniform(0.1, 1, (rows, k)).astype(np.float32)


def random_inputs(
    spec: Spec,
    rng: np.random.Generator,
    rows: int,
    scale: float = 1.0,
    lengths: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """Return arguments for one call of a block of `spec`; operators get no state.

    The rows are those of sequences of these `lengths`, or of random ones.
    """
    lengths = random_lengths(rng, rows) if lengths is None else lengths
    match spec:
        case specs.Embedding():
            return (random_batch(rng, lengths, vocab_size=spec.vocab_size),)
        case specs.ShortConv() | specs.Attention():
            x = random_rows(rng, rows, spec.hidden_size, scale)
            return x, random_batch(rng, lengths), None
        case specs.RMSNorm():
            return _hidden_and_delta(rng, rows, spec.hidden_size, scale)
        case specs.Experts():
            x = random_rows(rng, rows, spec.hidden_size, scale)
            return x, *random_routing(rng, spec, rows)
        case specs.SparseMoe():
            return (random_rows(rng, rows, spec.router.hidden_size, scale),)
        case specs.LastRows():
            hidden, delta = _hidden_and_delta(rng, rows, spec.hidden_size, scale)
            wanted = rng.permutation(rows)[: rows // 2 + 1].astype(np.int32)
            return hidden, delta, replace(random_batch(rng, lengths), logits_rows=wanted)
        case specs.Layer():
            size = spec.operator_norm.hidden_size
            hidden, delta = _hidden_and_delta(rng, rows, size, scale)
            return hidden, delta, random_batch(rng, lengths), None
        case specs.Choice():
            return (random_scores(rng, rows, spec.num_experts, scale),)
        case specs.MLP() | specs.Scores() | specs.Router() | specs.LMHead():
            return (random_rows(rng, rows, spec.hidden_size, scale),)
    raise TypeError(f"no inputs are known for a {type(spec).__name__}")


def first_lengths(lengths: Sequence[int], rows: int) -> list[int]:
    """Return the lengths of sequences of which the first `rows` rows alone are there."""
    ends = np.minimum(np.cumsum(lengths), rows)
    return [int(n) for n in np.diff(ends, prepend=0) if n]


def first_rows(inputs: Sequence[Any], count: int) -> list[Any]:
    """Return the arguments of the same call for the first `count` rows."""
    return [_first(value, count) for value in inputs]


def rows_of_first(spec: Spec, inputs: Sequence[Any], count: int) -> Any:
    """Return which rows of a call's result are those of the call for the first `count` rows."""
    if isinstance(spec, specs.LastRows):
        return np.flatnonzero(inputs[2].logits_rows < count)
    return slice(count)


def _first(value: Any, count: int) -> Any:
    if value is None:
        return None
    if not isinstance(value, Batch):
        return value[:count]
    ends = np.cumsum([0, *first_lengths(np.diff(value.cu_seqlens).tolist(), count)])
    batch = Batch.of_sequences([value.token_ids[a:b] for a, b in pairwise(ends)])
    return replace(batch, logits_rows=value.logits_rows[value.logits_rows < count])


def _hidden_and_delta(
    rng: np.random.Generator, rows: int, size: int, scale: float
) -> tuple[Float32, Float32]:
    return random_rows(rng, rows, size, scale), random_rows(rng, rows, size, scale)
