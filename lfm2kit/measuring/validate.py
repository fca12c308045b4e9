"""Judges logits against answers as the assignment does, without its gaps.

The assignment's own validators accept NaN (`fabs(NaN) > 1e-3` is false) and compare only the
samples that the answers happen to hold.  Here every sample counts, and a logit that is not finite
is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lfm2kit.precisions import Grade


def word(*, is_valid: bool) -> str:
    """Return the word for a verdict, for which graders search."""
    return "VALID" if is_valid else "INVALID"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One logit that differs too much."""

    sample: int
    vocab: int
    flat: int  # index into the flat outputs, as the assignment prints it
    output: float
    answer: float

    def __str__(self) -> str:
        return (
            f"First mismatch at sample[{self.sample}], vocab[{self.vocab}] "
            f"(output[{self.flat}]={self.output:.6f} <-> answer[{self.flat}]={self.answer:.6f})"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of comparing n samples."""

    samples: int
    values: int
    top1_matches: int
    mismatches: int
    first: Mismatch | None
    max_difference: float  # NaN where an output is not a number
    judged_by: str  # "logits" or "top-1"
    tolerance: float  # of |output - answer|
    problem: str | None = None  # why there was nothing to compare
    instead_of: str | None = None  # the grade's own judgement, if a tolerance was asked for

    @property
    def is_valid(self) -> bool:
        if self.problem is not None or not np.isfinite(self.max_difference):
            return False
        wrong = self.mismatches if self.judged_by == "logits" else 0
        return wrong == 0 and self.top1_matches == self.samples

    def lines(self) -> Iterator[str]:
        """Yield the lines that graders search for, word for word, and then further details."""
        accuracy = 100 * self.top1_matches / max(self.samples, 1)
        yield f"Top-1 Prediction Accuracy: {accuracy:g}% ({self.top1_matches}/{self.samples})"
        asked = f" ({self.tolerance:g} allowed {self.instead_of})" if self.instead_of else ""
        yield word(is_valid=self.is_valid) + asked
        if self.problem is not None:
            yield self.problem
        if self.first is not None:
            yield str(self.first)
            yield f"Total mismatches: {self.mismatches}/{self.values}"
        if self.problem is None:
            yield f"Largest difference: {self.max_difference:.3g} (tolerance {self.tolerance:g})"


def validate(
    outputs: npt.NDArray[np.float32],
    answers: npt.NDArray[np.float32],
    grade: Grade,
    tolerance: float | None = None,
) -> Verdict:
    """Compare outputs [n, vocab] with the first n answers [at least n, vocab].

    FP32's grade is judged by every logit and by top-1, that of 16 bits by top-1 alone, as in the
    assignment.  The verdict reports their differences as well.  With a `tolerance`, every logit is
    judged by it instead, whatever the grade.
    """
    samples = len(outputs)
    if len(answers) < samples:
        return nothing_to_compare(samples, f"{samples} samples, but only {len(answers)} answers")
    if answers.shape[1:] != outputs.shape[1:]:
        widths = f"{outputs.shape[1]} logits a sample, but {answers.shape[1]} in the answers"
        return nothing_to_compare(samples, widths)
    answers = answers[:samples]
    with np.errstate(invalid="ignore"):  # inf - inf: NaN, which counts as wrong
        difference = np.abs(outputs.astype(np.float64) - answers)
    allowed = grade.logit_error if tolerance is None else tolerance
    wrong = ~(difference <= allowed)  # true for NaN as well
    flat = np.flatnonzero(wrong)
    return Verdict(
        samples=samples,
        values=outputs.size,
        top1_matches=int(np.sum(outputs.argmax(axis=1) == answers.argmax(axis=1))),
        mismatches=len(flat),
        first=_mismatch(int(flat[0]), outputs, answers) if len(flat) else None,
        max_difference=float(difference.max(initial=0)),
        judged_by=grade.judged_by if tolerance is None else "logits",
        tolerance=allowed,
        instead_of=None if tolerance is None else _own_judgement(grade),
    )


def _own_judgement(grade: Grade) -> str:
    by = f"the {grade.logit_error:g}" if grade.judged_by == "logits" else "top-1 alone"
    return f"instead of {by} of the grade {grade.name}"


def not_finite(logits: npt.NDArray[np.float32]) -> str | None:
    """Return a sentence about the NaNs and infinities in logits [n, vocab]; None without any."""
    wrong = np.flatnonzero(~np.isfinite(logits))
    if not len(wrong):
        return None
    sample, vocab = divmod(int(wrong[0]), logits.shape[1])
    return (
        f"{len(wrong)} of {logits.size} logits are not finite, the first is "
        f"{logits[sample, vocab]} at sample[{sample}], vocab[{vocab}]: the weights or the config "
        "are wrong, or the precision is too low"
    )


def _mismatch(
    flat: int, outputs: npt.NDArray[np.float32], answers: npt.NDArray[np.float32]
) -> Mismatch:
    sample, vocab = divmod(flat, outputs.shape[1])
    return Mismatch(
        sample, vocab, flat, float(outputs[sample, vocab]), float(answers[sample, vocab])
    )


def nothing_to_compare(samples: int, problem: str) -> Verdict:
    """Return the verdict INVALID for answers that cannot be compared; `problem` says why."""
    return Verdict(samples, 0, 0, 0, None, float("nan"), "logits", 0, problem)
