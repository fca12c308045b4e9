"""The conformance suite on `blas`, and what the suite cannot know of it."""

from __future__ import annotations

from collections.abc import Callable

import lfm2kit_blas
import numpy as np
import pytest
from lfm2kit_blas.backend import BlasBackend, Linear

import lfm2kit.testing
from lfm2kit.backend import Context, Weights
from lfm2kit.formats import BF16
from lfm2kit.specs import LMHead

ROWS_SEEN = "BLAS picks its kernel, and with it the order of a sum, by the number of rows"


@lfm2kit.testing.parametrize_backend_checks(
    "blas",
    expected_failures={
        "batch-independence": ROWS_SEEN,
        "whole-model-batch-independence": ROWS_SEEN,
        "experts-split-by-slot-bitwise": f"{ROWS_SEEN}; an expert gets fewer of them a slot",
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_auto_never_picks_it() -> None:
    (plugin,) = lfm2kit_blas.lfm2kit_backends()
    assert plugin.preference == 0


@pytest.mark.parametrize("context", [Context(threads=2), Context(local_ranks=4)])
def test_it_says_that_threads_are_not_set_from_here(context: Context) -> None:
    assert not any("threads" in note for note in BlasBackend(Context()).notes())
    assert any("OPENBLAS_NUM_THREADS" in note for note in BlasBackend(context).notes())


def test_float32_weights_stay_where_they_are_and_misaligned_ones_are_copied() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(Linear(Weights.of_arrays({"weight": values})).weight, values)
    odd = np.frombuffer(b"\0" + values.tobytes(), np.float32, offset=1).reshape(2, 3)
    weight = Linear(Weights.of_arrays({"weight": odd})).weight
    assert weight.flags.aligned
    np.testing.assert_array_equal(weight, values)


def test_weights_of_16_bits_are_kept_in_float32_and_it_says_so() -> None:
    head = LMHead(vocab_size=5, hidden_size=3)
    weights = Weights.of_arrays({"weight": np.ones((5, 3))})
    stored = Weights({"weight": weights["weight"].stored_as(BF16)})
    sizes = [BlasBackend(Context()).workspace_bytes(head, w, tokens=0) for w in (weights, stored)]
    assert sizes == [0, Linear(stored).weight.nbytes]
