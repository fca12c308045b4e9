"""What a backend promises that draws tokens: the ones that NumPy draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Memory, Samples
from lfm2kit.engine.drawing import Drawn, DrawsAhead, NotANumber, NumPySampler, Row, Sampler
from lfm2kit.engine.sampling import Sampling
from lfm2kit.specs import LMHead
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped

Floats = npt.NDArray[np.float32]

SIZES = (1, 31, 32, 63, 64, 65, 200, 2048)  # of the vocabulary
LARGE = 65_536
ROWS = 24
WITHIN = 1e-6  # of a logprob, absolute and relative

CHOICES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 0.3, 1.0, 2.0),
    "top_k": (0, 0, 1, 5, 50),
    "top_p": (1.0, 1.0, 0.9, 0.5, 1e-6),
    "min_p": (0.0, 0.0, 0.15, 1.0),
    "repetition_penalty": (1.0, 1.05, 0.5),
    "presence_penalty": (0.0, 0.0, 0.5),
    "frequency_penalty": (0.0, 0.0, 0.25, -1.0),
}


@check
def sampled_tokens(trial: Trial) -> None:
    """Tokens, and logprobs, are those that NumPy draws, whatever a row asks for.

    Logits have ties, -inf, a single number, NaN; rows have penalties, biases, masks and forbidden
    ids, or are None, and nothing is drawn of them.
    """
    sampler, memory = _sampler(trial)
    for size in SIZES:
        logits = np.stack([_logits(trial.rng, size) for _ in range(ROWS)])
        rows = [_row(trial.rng, size) for _ in range(ROWS)]
        _compare(sampler, memory, logits, [None, *rows[1:-2], None, rows[-1]])


@check
def sampled_tokens_of_large_vocabularies(trial: Trial) -> None:
    """Tokens are those that NumPy draws from 65,536 logits, with each way of removing tokens."""
    sampler, memory = _sampler(trial)
    asked = [
        Sampling(temperature=0.3, min_p=0.15, repetition_penalty=1.05),
        Sampling(),
        Sampling(temperature=0),
        Sampling(top_k=50),
        Sampling(temperature=3, top_k=500),
        Sampling(top_p=0.9),
        Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05),
    ]
    logits = 3 * trial.rng.standard_normal((len(asked), LARGE), dtype=np.float32)
    rows = [_row(trial.rng, LARGE)._replace(sampling=one, mask=None) for one in asked]
    _compare(sampler, memory, logits, rows)
    _compare(sampler, memory, np.round(logits), rows)


@check
def sampled_tokens_depend_on_their_row_alone(trial: Trial) -> None:
    """A row draws the same token alone, among others, and beside a row of NaN; logits stay."""
    sampler, memory = _sampler(trial)
    logits = np.stack([_logits(trial.rng, 200) for _ in range(ROWS)])
    rows = [_row(trial.rng, 200) for _ in range(ROWS)]
    logits[ROWS // 2] = np.nan
    together = _drawn(sampler, memory, logits, rows)
    alone = [_drawn(sampler, memory, logits[[i]], rows[i : i + 1])[0] for i in range(ROWS)]
    if together != alone:
        raise CheckFailed(f"among others: {together}, alone: {alone}")


@check
def tokens_drawn_ahead(trial: Trial) -> None:
    """Drawings that begin one after the other have the tokens of drawings that are waited for.

    Rows count the token of the drawing before, whose id has not been read.
    """
    sampler, memory = _sampler(trial)
    if not isinstance(sampler, DrawsAhead):
        raise Skipped("its sampler does not draw ahead")
    for size in SIZES:
        logits = [np.stack([_logits(trial.rng, size) for _ in range(ROWS)]) for _ in range(3)]
        asked = [[None, *(_row(trial.rng, size) for _ in range(ROWS - 1))] for _ in range(3)]
        there = [memory.from_host(one) for one in logits]
        drawings = [sampler.begin(there[0], asked[0])]
        for one, rows in zip(there[1:], asked[1:], strict=True):
            drawings.append(sampler.begin(one, rows, drawings[-1].token_ids))
        found = [drawing.end() for drawing in drawings]
        newest: Any = None
        for which, drawing in enumerate(drawings):
            rows = asked[which] if which == 0 else _after(asked[which], newest)
            _judge(found[which], NumPySampler().draw(logits[which], rows), rows, size)
            newest = memory.to_host(drawing.token_ids)
            _judge_ids(newest, found[which], size)


def _after(rows: Sequence[Row | None], newest: npt.NDArray[np.int32]) -> list[Row | None]:
    """Return the rows with these ids as the last of their generated ones, if they have any."""
    known = []
    for row, token_id in zip(rows, newest, strict=True):
        generated = np.zeros(0, np.int32) if row is None else row.generated.copy()
        generated[-1:] = token_id
        known.append(row and row._replace(generated=generated))
    return known


def _judge_ids(
    token_ids: npt.NDArray[np.int32], drawn: Sequence[Drawn | NotANumber | None], size: int
) -> None:
    """Raise `CheckFailed` unless these are the ids that were drawn, or any that there are."""
    for token_id, one in zip(token_ids.tolist(), drawn, strict=True):
        if isinstance(one, Drawn) and token_id != one.token_id:
            raise CheckFailed(f"token_ids has {token_id} for {one}")
        if isinstance(one, NotANumber) and not 0 <= token_id < size:
            raise CheckFailed(f"token_ids has {token_id} where no token can be drawn")


def _sampler(trial: Trial) -> tuple[Sampler, Memory]:
    if not isinstance(trial.backend, Samples):
        raise Skipped("it has no sampler")
    heads = [spec for spec in CASES["head"] if isinstance(spec, LMHead)]
    return trial.backend.sampler(), trial.backend.memory(trial.supported(heads)[0])


def _compare(sampler: Sampler, memory: Memory, logits: Floats, rows: Sequence[Row | None]) -> None:
    found = _drawn(sampler, memory, logits, rows)
    _judge(found, NumPySampler().draw(logits, rows), rows, logits.shape[1])


def _judge(
    found: Sequence[Drawn | NotANumber | None],
    expected: Sequence[Drawn | NotANumber | None],
    rows: Sequence[Row | None],
    size: int,
) -> None:
    for got, want, row in zip(found, expected, rows, strict=True):
        if not _agree(got, want):
            raise CheckFailed(f"vocabulary of {size}: {got} instead of {want}, for {row}")


def _drawn(
    sampler: Sampler, memory: Memory, logits: Floats, rows: Sequence[Row | None]
) -> list[Drawn | NotANumber | None]:
    there = memory.from_host(logits.copy())
    found = sampler.draw(there, rows)
    if not np.array_equal(memory.to_host(there), logits, equal_nan=True):
        raise CheckFailed("the sampler has written to the logits")
    if len(found) != len(rows):
        raise CheckFailed(f"{len(found)} results for {len(rows)} rows")
    return found


def _agree(got: Drawn | NotANumber | None, want: Drawn | NotANumber | None) -> bool:
    if not isinstance(got, Drawn) or not isinstance(want, Drawn):
        return got == want
    if got.token_id != want.token_id or (got.logprob is None) != (want.logprob is None):
        return False
    if [token_id for token_id, _ in got.best] != [token_id for token_id, _ in want.best]:
        return False
    found, expected = (
        [one.logprob or 0.0, *(value for _, value in one.best)] for one in (got, want)
    )
    return bool(np.allclose(found, expected, rtol=WITHIN, atol=WITHIN))


def _logits(rng: np.random.Generator, size: int) -> Floats:
    """Return a row of one of several kinds."""
    normal = 3 * rng.standard_normal(size, dtype=np.float32)
    kind = rng.integers(7)
    if kind == 0:
        return np.round(normal)
    if kind == 1:
        return np.full(size, normal[0])
    if kind == 2:
        return np.where(rng.random(size) < 0.5, normal, np.float32(-np.inf))
    if kind == 3:
        return np.where(np.arange(size) == rng.integers(size), normal, np.float32(-np.inf))
    if kind == 4 and rng.random() < 0.3:
        normal[rng.integers(size)] = rng.choice([np.nan, np.inf])
    return normal


def _row(rng: np.random.Generator, size: int) -> Row:
    """Return what a row asks for, at random."""
    asked = {name: rng.choice(values).item() for name, values in CHOICES.items()}
    biases = rng.integers(size, size=rng.choice([0, 0, 3])).tolist()
    sampling = Sampling(
        **{**asked, "top_k": int(asked["top_k"])},
        logit_bias={token_id: float(rng.normal()) for token_id in biases},
    )
    words = rng.integers(2**32, size=-(-size // 32), dtype=np.uint32)
    return Row(
        sampling,
        seed=int(rng.integers(2**63)),
        position=int(rng.integers(128_000)),
        prompt=rng.integers(size, size=rng.integers(20)).astype(np.int32),
        generated=rng.integers(size, size=rng.integers(20)).astype(np.int32),
        mask=words if rng.random() < 0.3 else None,
        forbidden=tuple(rng.integers(size, size=rng.choice([0, 0, 2])).tolist()),
        logprobs=int(rng.choice([0, 1, 20])) if rng.random() < 0.3 else None,
    )
