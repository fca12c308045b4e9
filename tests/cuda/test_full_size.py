"""The random weights of the benchmarks at full size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lfm2kit.formats import BF16

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "cuda"


def test_no_two_words_of_a_table_larger_than_the_pool_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alike, as they were, they share the lead: then no top-1 has a margin."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import full_size

    monkeypatch.setattr(full_size, "POOL", 1 << 12)
    name, shape = "embed_tokens.weight", (128, 64)
    words = full_size.RandomTensors({name: shape}, BF16)[name].data
    assert words.shape == shape
    assert len(np.unique(words, axis=0)) == len(words)
