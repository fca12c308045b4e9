"""The conformance suite on `blas`, and what the suite cannot know of it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import lfm2kit_blas
import numpy as np
import pytest
from lfm2kit_blas.backend import BlasBackend, Floats, Linear
from lfm2kit_blas.backend import ShortConv as ShortConvBlock

import lfm2kit.testing
from lfm2kit.backend import Context, Promise, Room, Weights
from lfm2kit.formats import BF16
from lfm2kit.specs import MLP, Experts, LMHead, ShortConv, Spec
from lfm2kit.testing import CHECKS
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights
from lfm2kit.testing.runner import judged
from lfm2kit.testing.scope import Scope

BITS_OF_STATES = [
    check.id for check in CHECKS.values() if check.promise is Promise.CHUNK_INVARIANCE
]


@lfm2kit.testing.parametrize_backend_checks("blas")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("check", BITS_OF_STATES)
def test_states_keep_the_bits_where_products_do_not_depend_on_other_rows(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row_by_row(self: Linear, x: Floats) -> Floats:
        rows = [row @ self.weight.T for row in x]
        y = np.array(rows, np.float32).reshape(len(x), len(self.weight))
        return y if self.bias is None else y + self.bias

    monkeypatch.setattr(Linear, "__call__", row_by_row)
    assert judged(check, BlasBackend(Context()), scope=Scope(examples=3)).verdict == "passed"


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
    sizes = [BlasBackend(Context()).kept_bytes(head, w) for w in (weights, stored)]
    assert sizes == [0, Linear(stored).weight.nbytes]


@pytest.mark.parametrize("room", [Room(0), Room(3, 128)])
def test_a_state_has_the_size_that_the_backend_says(room: Room) -> None:
    backend, spec = BlasBackend(Context()), ShortConv(24, 3)
    block = backend.build(spec, random_weights(spec))
    assert isinstance(block, ShortConvBlock)
    assert backend.state_bytes(spec, room) == block.new_state(room).rows.nbytes


@pytest.mark.parametrize(
    "spec",
    [ShortConv(64, 3), MLP(64, 96), Experts(64, 32, 32, 4, tuple(range(32))), LMHead(64, 64)],
)
def test_a_call_needs_the_memory_that_the_backend_says(spec: Spec) -> None:
    backend, rows = BlasBackend(Context()), 4096
    block = backend.build(spec, random_weights(spec))
    inputs = random_inputs(spec, np.random.default_rng(0), rows)
    tracemalloc.start()
    try:
        result = block(*inputs)
        peak = tracemalloc.get_traced_memory()[1] - result.nbytes
    finally:
        tracemalloc.stop()
    said = backend.scratch_bytes(spec, rows)
    assert said <= peak < 1.5 * said + 10_000
