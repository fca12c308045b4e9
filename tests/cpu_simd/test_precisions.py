"""Precisions of 16 bits: weights rounded, arithmetic in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.convert import source_of, write_checkpoint
from lfm2kit.formats import BF16, F16, Format
from lfm2kit.loading import set_up
from lfm2kit.plan import Plan

CHECKPOINT = Path(__file__).parents[1] / "oracle" / "t01_router_bias_and_normalisation"  # F32
BATCH = Batch.of_sequences([range(9), range(20, 24)])


def logits(folder: Path, precision: str) -> np.ndarray:
    setup = set_up(
        open_checkpoint(folder), Plan.parse("cpu_simd"), context=Context(precision=precision)
    )
    return setup.build().logits(BATCH)


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
