"""The judgement: every sample counts, and what is not finite is wrong."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lfm2kit.measuring.validate import validate
from lfm2kit.precisions import BF16_GRADE, FP32_GRADE, Grade

Floats = npt.NDArray[np.float32]


@pytest.fixture
def answers() -> Floats:
    return np.random.default_rng(1).normal(0, 3, (6, 40)).astype(np.float32)


def test_equal_outputs_are_valid_in_the_lines_that_graders_grep(answers: Floats) -> None:
    verdict = validate(answers[:4], answers, FP32_GRADE)
    assert verdict.is_valid
    lines = list(verdict.lines())
    assert lines[:2] == ["Top-1 Prediction Accuracy: 100% (4/4)", "VALID"]


def test_a_difference_over_the_tolerance_is_invalid_and_located(answers: Floats) -> None:
    outputs = answers.copy()
    outputs[2, 7] += 2 * FP32_GRADE.logit_error
    outputs[5, 0] -= 2 * FP32_GRADE.logit_error
    verdict = validate(outputs, answers, FP32_GRADE)
    assert not verdict.is_valid
    text = "\n".join(verdict.lines())
    assert "INVALID" in text
    assert "First mismatch at sample[2], vocab[7] (output[87]=" in text
    assert "Total mismatches: 2/240" in text


def test_a_difference_at_half_the_tolerance_is_valid(answers: Floats) -> None:
    assert validate(answers + np.float32(FP32_GRADE.logit_error / 2), answers, FP32_GRADE).is_valid


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grade", [FP32_GRADE, BF16_GRADE])
def test_what_is_not_finite_is_invalid(answers: Floats, value: float, grade: Grade) -> None:
    outputs = answers.copy()
    outputs[3, int(answers[3].argmin())] = value
    assert not validate(outputs, answers, grade).is_valid


def test_infinity_in_both_is_no_match(answers: Floats) -> None:
    answers[1, 1] = np.inf
    assert not validate(answers, answers, FP32_GRADE).is_valid


def test_16_bit_precisions_are_judged_by_top_1_alone(answers: Floats) -> None:
    outputs = answers + np.float32(0.01)
    verdict = validate(outputs, answers, BF16_GRADE)
    assert verdict.is_valid
    assert verdict.mismatches == outputs.size
    outputs[0, answers[0].argmin()] = 99
    assert not validate(outputs, answers, BF16_GRADE).is_valid


def test_a_wrong_top_1_within_the_tolerance_is_invalid() -> None:
    answers = np.array([[1.0, 1.0005, 0]], dtype=np.float32)
    outputs = np.array([[1.0004, 1.0, 0]], dtype=np.float32)
    verdict = validate(outputs, answers, FP32_GRADE)
    assert verdict.mismatches == 0
    assert not verdict.is_valid


def test_fewer_answers_than_samples_and_another_width_are_invalid(answers: Floats) -> None:
    assert "only 3 answers" in str(validate(answers, answers[:3], FP32_GRADE).problem)
    assert not validate(answers, answers[:3], FP32_GRADE).is_valid
    assert not validate(answers, answers[:, :39], FP32_GRADE).is_valid


def test_a_tolerance_that_is_asked_for_judges_every_logit_and_is_named(answers: Floats) -> None:
    outputs = answers + np.float32(0.01)
    for grade, own in ((FP32_GRADE, "the 0.001 of the grade FP32"), (BF16_GRADE, "top-1 alone")):
        verdict = validate(outputs, answers, grade, tolerance=0.02)
        assert verdict.is_valid
        line = list(verdict.lines())[1]
        assert line.startswith(f"VALID (0.02 allowed instead of {own}")
        assert not validate(outputs, answers, grade, tolerance=0.005).is_valid


def test_a_grade_of_a_plugins_own_says_what_is_judged(answers: Floats) -> None:
    coarse = Grade("coarse", 0.1, "logits", logit_error=0.5)
    verdict = validate(answers + np.float32(0.4), answers, coarse)
    assert verdict.is_valid
    assert list(verdict.lines())[-1].endswith("(tolerance 0.5)")
    assert not validate(answers + np.float32(0.6), answers, coarse).is_valid
