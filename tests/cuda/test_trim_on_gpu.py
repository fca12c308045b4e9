"""A trimmed model on a real GPU: the bits of the whole one, in a captured graph too."""

from __future__ import annotations

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.batch import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.model import LFM2
from tests.random_model import RANDOM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

LENGTHS = [[16] * 16, [16, 1, 2, 3, 4, 5, 6, 33], [1]]


def model(plan: str, precision: str, *, trim: bool) -> LFM2:
    options = Options(backend=plan, precision=precision, rewrites=("trim",) * trim)
    return set_up(RANDOM, options).build()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("plan", ["cuda", "hybrid"])
def test_logits_keep_their_bits(plan: str, precision: str) -> None:
    whole, trimmed = model(plan, precision, trim=False), model(plan, precision, trim=True)
    rng = np.random.default_rng(0)
    for lengths in LENGTHS * 3:  # the second and third time cuda replays a graph
        samples = [rng.integers(1024, size=n, dtype=np.int32) for n in lengths]
        expected = whole.logits(Batch.of_sequences(samples)).copy()
        assert np.array_equal(trimmed.logits(Batch.of_sequences(samples)), expected)


def test_in_16_bits_the_layers_before_stay_whole() -> None:
    leaves = {leaf.name for leaf in model("cuda", "bf16", trim=True).placed.leaves()}
    assert {"layers.4", "layers.5.last_rows", "layers.7.feed_forward"} <= leaves
