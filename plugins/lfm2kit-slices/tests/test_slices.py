"""The rewrite as users choose it: by its name, with any plan."""

from __future__ import annotations

import lfm2kit_slices
import numpy as np
import pytest
from lfm2kit_slices import SlicedBlock, SlicedMLP

from lfm2kit.batch import Batch
from lfm2kit.building.loading import find_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.specs import MLP


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8])
def test_each_row_is_computed_once_and_comes_back_to_its_place(rows: int) -> None:
    seen = []

    def doubled(x):  # type: ignore[no-untyped-def]
        seen.append(len(x))
        return 2 * x

    x = np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2)
    delta = SlicedBlock(SlicedMLP(MLP(2, 5), rows=4), doubled)(x)
    assert np.array_equal(delta, 2 * x)
    assert sum(seen) == rows
    assert max(seen, default=0) <= 4


def test_the_logits_keep_their_bits() -> None:
    batch = Batch.of_sequences([[i % 100] * 20 for i in range(20)])
    assert batch.tokens > lfm2kit_slices.ROWS
    checkpoint = open_checkpoint(find_model("tiny"))
    whole = set_up(checkpoint, Options(backend="reference")).build().logits(batch).copy()
    setup = set_up(checkpoint, Options(backend="reference", rewrites=("slices",)))
    assert [one.name for one in setup.placed.tree() if isinstance(one.spec, SlicedMLP)] == [
        "layers.0.feed_forward",
        "layers.1.feed_forward",
    ]
    assert np.array_equal(setup.build().logits(batch), whole)
