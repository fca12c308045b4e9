"""Precisions of 16 bits: weights rounded, arithmetic in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lfm2kit_cpu_simd import BF16_WEIGHTS, F16_WEIGHTS

from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.convert import source_of, write_checkpoint
from lfm2kit.formats import BF16, F16, Format
from lfm2kit.precisions import FP32_GRADE

CHECKPOINT = Path(__file__).parents[1] / "oracle" / "router_bias_and_normalisation"  # F32
BATCH = Batch.of_sequences([range(9), range(20, 24)])


def setup(folder: Path, precision: str, plan: str) -> Setup:
    return set_up(open_checkpoint(folder), Options(backend=plan, precision=precision))


def logits(folder: Path, precision: str, plan: str = "cpu_simd") -> np.ndarray:
    return setup(folder, precision, plan).build().logits(BATCH)


@pytest.mark.parametrize(("precision", "format"), [("bf16", BF16), ("fp16", F16)])
def test_a_precision_of_16_bits_rounds_the_matrices(
    tmp_path: Path, precision: str, format: Format
) -> None:
    """Not the router's, nor the embedding, so that the whole checkpoint rounded is close only."""
    exact = logits(CHECKPOINT, "fp32")
    rounded = logits(CHECKPOINT, precision)
    assert 1e-5 < np.abs(rounded - exact).max() < 0.3
    write_checkpoint(source_of(open_checkpoint(CHECKPOINT)), tmp_path / "rounded", format)
    once = logits(tmp_path / "rounded", "fp32")
    np.testing.assert_array_equal(logits(tmp_path / "rounded", precision), once)


def test_an_item_of_a_plan_has_a_precision_of_its_own() -> None:
    np.testing.assert_array_equal(
        logits(CHECKPOINT, "fp32", "cpu_simd:bf16"), logits(CHECKPOINT, "bf16")
    )
    np.testing.assert_array_equal(
        logits(CHECKPOINT, "bf16", "cpu_simd,norm=cpu_simd:fp32,head=cpu_simd:fp32"),
        logits(CHECKPOINT, "fp32", "cpu_simd:bf16,norm=cpu_simd,head=cpu_simd"),
    )
    mixed = logits(CHECKPOINT, "fp32", "cpu_simd,mlp=cpu_simd:bf16")
    for precision in ("fp32", "bf16"):
        assert np.any(mixed != logits(CHECKPOINT, precision))


@pytest.mark.parametrize(
    ("precision", "plan", "grade"),
    [
        ("fp32", "cpu_simd", FP32_GRADE),
        ("bf16", "cpu_simd", BF16_WEIGHTS),
        ("fp32", "cpu_simd,0.mlp=cpu_simd:fp16", F16_WEIGHTS),
        ("fp16", "cpu_simd:fp32,attn=reference:fp32", FP32_GRADE),
        ("fp32", "auto:bf16,attn=reference", BF16_WEIGHTS),
    ],
)
def test_results_are_judged_by_the_coarsest_grade_in_use(
    precision: str, plan: str, grade: object
) -> None:
    assert setup(CHECKPOINT, precision, plan).grade == grade
