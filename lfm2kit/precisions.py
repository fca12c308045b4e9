"""Precisions that backends announce, and the grade by which their results are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lfm2kit.formats import Format


@dataclass(frozen=True, slots=True)
class Grade:
    """The accuracy that a precision promises, by which results are judged right or wrong.

    A block's error has two parts, and each has its limit.  `block_error` limits what its kernels
    add: the largest difference from the reference with the same weights, relative to the largest
    value of the result.  Those are the weights in the formats that the backend keeps them in, if it
    tells them (`lfm2kit.backend.KeepsFormats`), and as they are stored otherwise.

    `block_nmse` limits what rounding the weights adds: the normalised mean square error,
    sum((got - want)^2) / sum(want^2), where the reference has the weights as they are stored.  With
    None, `block_error` holds for these as well.
    """

    name: str
    block_error: float
    judged_by: Literal["logits", "top-1"]  # what `run -v` compares with the answers
    logit_error: float = 1e-3  # |logit - answer| above this is a mismatch, which `-v` reports
    block_nmse: float | None = None

    @property
    def coarseness(self) -> tuple[bool, float, float]:
        """Return a key that is larger for a grade that promises less about the logits."""
        return self.judged_by == "top-1", self.logit_error, max(self.block_error, self.rounding)

    @property
    def rounding(self) -> float:
        """Return the root of `block_nmse`: the error of rounded weights, relative to the result."""
        return math.sqrt(self.block_nmse or 0)


FP32_GRADE = Grade("FP32", 2e-5, "logits")  # some hundred roundings of float32
# Activations are rounded as well, to 8 and 11 bits: eight times as coarsely.
BF16_GRADE = Grade("BF16", 4e-2, "top-1")
FP16_GRADE = Grade("FP16", 5e-3, "top-1")


@dataclass(frozen=True, slots=True)
class Precision:
    """One of a backend's precisions; options and plans name it."""

    name: str
    grade: Grade
    weights: Format | None = None  # if set: weights that this format does not hold are refused


FP32 = Precision("fp32", FP32_GRADE)
