"""Precisions that backends announce, and the grade by which their results are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lfm2kit.formats import Format


@dataclass(frozen=True, slots=True)
class Grade:
    """The accuracy that a precision promises, by which results are judged right or wrong."""

    name: str
    block_error: float  # of one block, relative to its result's largest value
    judged_by: Literal["logits", "top-1"]  # what `run -v` compares with the answers
    logit_error: float = 1e-3  # |logit - answer| above this is a mismatch, which `-v` reports


FP32_GRADE = Grade("FP32", 2e-5, "logits")  # some hundred roundings of float32
SIXTEEN_BIT = Grade("16-bit", 2e-2, "top-1")


@dataclass(frozen=True, slots=True)
class Precision:
    """One of a backend's precisions; options and plans name it."""

    name: str
    grade: Grade
    weights: Format | None = None  # if set: weights that this format does not hold are refused


FP32 = Precision("fp32", FP32_GRADE)
