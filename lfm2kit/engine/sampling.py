"""What a user asks of the choice of tokens, and the bounds of each number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nextafter
from numbers import Integral, Real
from reprlib import repr as brief  # of what a caller gives, however long it is
from typing import Any, NamedTuple

from lfm2kit import bounds
from lfm2kit.errors import Lfm2kitError, Option

BIAS = Option("logit_bias")
MOST_LOGPROBS = 20  # of the best tokens beside the one that is drawn

# No logit within LARGEST leaves the range of float32 by what these bounds allow.
LARGEST = 1e30  # a logit beyond it counts as infinite
LEAST_TEMPERATURE = 1e-5  # above zero
MOST_CHANGE = 1000.0  # of a logit, by a penalty, a bias or a temperature


class Range(NamedTuple):
    """The values that a number may have."""

    least: float
    most: float
    expected: str
    is_whole: bool = False
    or_zero: bool = False

    def holds(self, value: Any) -> bool:
        """Return whether `value` is such a number.  NaN is not, and neither is a bool."""
        if not _is_a(Integral if self.is_whole else Real, value):
            return False
        return bool(self.least <= value <= self.most or (self.or_zero and value == 0))


def _real(least: float, most: float) -> Range:
    return Range(least, most, f"a number from {least:g} to {most:g}")


CHANGE = _real(-MOST_CHANGE, MOST_CHANGE)
RANGES: Mapping[str, Range] = {
    "temperature": Range(
        LEAST_TEMPERATURE,
        MOST_CHANGE,
        f"0, which is greedy, or a number from {LEAST_TEMPERATURE:g} to {MOST_CHANGE:g}",
        or_zero=True,
    ),
    "top_k": Range(0, bounds.DIMENSION, "a whole number from 0, which keeps all", is_whole=True),
    "top_p": Range(nextafter(0, 1), 1, "a number above 0, up to 1"),
    "min_p": _real(0, 1),
    "repetition_penalty": _real(1 / MOST_CHANGE, MOST_CHANGE),
    "presence_penalty": CHANGE,
    "frequency_penalty": CHANGE,
    "seed": Range(0, bounds.SEED, f"a whole number from 0 to {bounds.SEED}", is_whole=True),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.  Raise `Lfm2kitError` for a value out of range, and name it."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # by token id
    seed: int = 0

    def __post_init__(self) -> None:
        for name, number in RANGES.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), number))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def check_ids(self, vocab_size: int) -> None:
        """Raise `Lfm2kitError` if a bias is for a token that the vocabulary does not have."""
        beyond = max(self.logit_bias, default=0)
        if beyond >= vocab_size:
            raise Lfm2kitError(
                BIAS, f": token id {beyond} is outside the vocabulary of {vocab_size}"
            )


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _checked(name: str, value: Any, number: Range) -> int | float:
    """Return `value` as Python's own number, NumPy's included; raise `Lfm2kitError` otherwise."""
    if not number.holds(value):
        raise Lfm2kitError(Option(name, value), f": expected {number.expected}")
    return int(value) if number.is_whole else float(value)


def _checked_bias(logit_bias: Any) -> dict[int, float]:
    """Return a copy that its giver cannot change."""
    if not isinstance(logit_bias, Mapping):
        raise Lfm2kitError(BIAS, f" is {brief(logit_bias)}; expected a bias by token id")
    for token_id, bias in logit_bias.items():
        if not _is_a(Integral, token_id) or not 0 <= token_id <= bounds.DIMENSION:
            raise Lfm2kitError(
                BIAS, f": {brief(token_id)} is not a token id, which is a whole number from 0"
            )
        if not CHANGE.holds(bias):
            raise Lfm2kitError(
                BIAS,
                f": the bias of token {token_id} is {brief(bias)}; expected {CHANGE.expected}",
            )
    return {int(token_id): float(bias) for token_id, bias in logit_bias.items()}
