"""Random examples beside the fixed cases, as many as are asked for; hypothesis makes them small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lfm2kit.promises import Promise
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import guards
from lfm2kit.testing.examples import judge_call, judge_program
from lfm2kit.testing.random_weights import seed_of
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import Skipped


@guards(Promise.BATCH_INVARIANCE)
def random_calls(trial: Trial) -> None:
    """Blocks of random sizes have right values, for sequences of random lengths.

    Each sequence has the bits that it has alone.  A failure shows the smallest example that was
    found.  `--examples N` draws N of each kind of block; it needs hypothesis.
    """
    draws = _draws(trial)
    lengths = draws.lengths(40, 5, 63, 64, 65, 129)
    for specs, seed in _of_each_kind(trial, draws.SPECS):
        drawn = draws.together(specs, lengths, draws.SEEDS)
        draws.search(drawn, lambda one: judge_call(trial, *one), trial.scope.examples, seed)


@guards(Promise.CHUNK_INVARIANCE)
def random_programs(trial: Trial) -> None:
    """Random sequences grow, fork, step back and end in any order, with the bits of each alone.

    Blocks are operators and dense layers of random sizes; pages are given in random order.
    `--examples N` draws N programs for each of these kinds; it needs hypothesis.
    """
    draws = _draws(trial)
    for specs, seed in _of_each_kind(trial, draws.WITH_STATE):
        drawn = draws.together(specs, draws.programs())
        draws.search(drawn, lambda one: judge_program(trial, *one), trial.scope.examples, seed)


def _draws(trial: Trial) -> Any:
    """Return the module that draws; raise `Skipped` if no examples are asked for."""
    if not trial.scope.examples:
        raise Skipped("no random examples are asked for, or hypothesis is not installed")
    from lfm2kit.testing import draws  # the one that needs hypothesis

    return draws


def _of_each_kind(trial: Trial, strategies: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """Yield a strategy of specs of each kind that the backend builds, and a seed for it."""
    kinds = [kind for kind in strategies if trial.takes_any(CASES[kind])]
    if not kinds:
        trial.supported([spec for kind in strategies for spec in CASES[kind]])  # says why
    seed = int(trial.rng.integers(2**32))
    for kind in kinds:
        yield _draws(trial).fitting(strategies[kind], trial.fitted), seed + seed_of(kind)
