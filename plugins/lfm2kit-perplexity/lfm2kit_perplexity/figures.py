"""The figures that the numbers of all tokens come to, as lines and in a record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lfm2kit.records import Report
from lfm2kit_perplexity.scoring import Float64, Scores


class Mean(NamedTuple):
    """A mean over tokens, and its standard error as if they were independent."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Float64) -> Mean:
        spread = values.std(ddof=1) if len(values) > 1 else math.nan
        return cls(float(values.mean()), float(spread / math.sqrt(len(values))))


def perplexity(logprobs: Float64) -> Mean:
    """Return exp(mean of -logprob), and its error."""
    loss = Mean.of(-logprobs)
    with np.errstate(over="ignore"):
        value = float(np.exp(loss.value))
    return Mean(value, value * loss.error)


def report_model(report: Report, logprobs: Float64, text_bytes: int) -> None:
    """Report how well a model predicts a text of `text_bytes` bytes."""
    found = perplexity(logprobs)
    bits = float(-logprobs.sum() / math.log(2) / text_bytes)
    report.line(f"perplexity:          {found.value:.4f} ± {found.error:.4f}")
    report.line(f"bits per byte:       {bits:.4f}")
    report.figure("perplexity", "", [found.value], "lower")
    report.figure("bits per byte", "bits/B", [bits], "lower")
    report.fields["perplexity_error"] = found.error


def report_difference(report: Report, scores: Scores) -> None:
    """Report how far a model is from the one that it is compared with."""
    other, divergence = perplexity(scores.base_logprobs), Mean.of(scores.divergences)
    loss, same = Mean.of(scores.base_logprobs - scores.logprobs), Mean.of(scores.agreements)
    for line in _difference_lines(other, loss, divergence, same, scores):
        report.line(line)
    largest = float(scores.divergences.max())
    report.figure("perplexity of the other", "", [other.value])
    report.figure("mean KL divergence", "nats", [divergence.value], "lower")
    report.figure("largest KL divergence", "nats", [largest], "lower")
    report.figure("same best token", "", [same.value], "higher")
    report.fields["divergence_error"] = divergence.error


def _difference_lines(
    other: Mean, loss: Mean, divergence: Mean, same: Mean, scores: Scores
) -> Iterator[str]:
    yield f"of the other:        {other.value:.4f} ± {other.error:.4f}"
    yield f"log of the ratio:    {loss.value:.6f} ± {loss.error:.6f}"
    yield f"mean KL divergence:  {divergence.value:.6f} ± {divergence.error:.6f} nats"
    yield f"the largest:         {scores.divergences.max():.6f} nats"
    yield f"same best token:     {same.value:.2%} ± {same.error:.2%}"
