"""What the backend says of memory, beside what its blocks allocate."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend

from lfm2kit import specs
from lfm2kit.backend import Context, Room, Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.compare import each
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights

EPS = 1e-5
OBJECTS = 20_000  # bytes, and more than Python's own objects take beside the arrays
TILES = 200_000  # bytes, and more than the sums take that a kernel's threads keep in their caches
# All widths fill their panels, which are 64 columns wide or a part of it: there is no padding.
EXPERTS = specs.Experts(512, 256, 8, 2, range(8))
ROUTER = specs.Router(512, 64, 2, True, True, 1.0)
FULL: tuple[Spec, ...] = (
    specs.Embedding(512, 512),
    specs.RMSNorm(512, EPS),
    specs.ShortConv(512, 3, bias=True),
    specs.Attention(512, 4, 2, 64, 1e6, EPS),
    specs.MLP(512, 768),
    ROUTER.scores,
    ROUTER.choice,
    ROUTER,
    EXPERTS,
    specs.LastRows(512),
    specs.LMHead(512, 512),
)
ODD = [spec for kind, cases in CASES.items() if kind != "layer" for spec in cases]
OPERATORS = [spec for kind in ("conv", "attn") for spec in CASES[kind]]


def allocated(make: Callable[[], Any]) -> tuple[Any, int, int]:
    """Return what `make` makes, the bytes that stay allocated, and the most that there were."""
    tracemalloc.start()
    try:
        made = make()
        return made, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", FULL, ids=str)
def test_a_block_keeps_what_the_backend_says(spec: Spec, precision: str) -> None:
    backend, weights = CpuSimdBackend(Context(precision)), random_weights(spec)
    backend.build(spec, weights)  # the first one loads its kernels
    _, kept, _ = allocated(lambda: backend.build(spec, weights))
    said = backend.kept_bytes(spec, weights)
    assert said <= kept < said + OBJECTS


@pytest.mark.parametrize("spec", ODD, ids=str)
def test_a_block_of_odd_widths_keeps_no_less_than_the_backend_says(spec: Spec) -> None:
    backend, weights = CpuSimdBackend(Context()), random_weights(spec)
    _, kept, _ = allocated(lambda: backend.build(spec, weights))
    assert backend.kept_bytes(spec, weights) <= kept


@pytest.mark.parametrize("spec", FULL, ids=str)
def test_a_call_needs_what_the_backend_says(spec: Spec) -> None:
    backend, rows = CpuSimdBackend(Context()), 2048
    block = backend.build(spec, random_weights(spec))
    inputs = random_inputs(spec, np.random.default_rng(0), rows)
    with ThreadPoolExecutor(1) as thread:  # a new one has no buffers yet
        results, _, most = allocated(lambda: thread.submit(block, *inputs).result())
    new = [array for array in each(results) if not any(array is argument for argument in inputs)]
    needed = most - sum(array.nbytes for array in new)
    said = backend.scratch_bytes(spec, rows)
    assert said <= needed < 1.1 * said + OBJECTS + TILES


def test_a_thread_that_calls_all_blocks_keeps_what_the_largest_of_them_needs() -> None:
    backend, rows = CpuSimdBackend(Context()), 2048
    specs_of_a_model = [*FULL, specs.Experts(512, 192, 8, 4, range(8))]
    calls = [
        partial(
            backend.build(spec, random_weights(spec)),
            *random_inputs(spec, np.random.default_rng(0), rows),
        )
        for spec in specs_of_a_model
    ]

    def all_called() -> None:
        for call in calls:
            call()

    with ThreadPoolExecutor(1) as thread:  # a new one has no buffers yet
        _, kept, _ = allocated(lambda: thread.submit(all_called).result())
    said = max(backend.scratch_bytes(spec, rows) for spec in specs_of_a_model)
    assert said <= kept < 1.05 * said + OBJECTS + TILES


@pytest.mark.parametrize("room", [Room(0), Room(1, 64), Room(3, 192)], ids=str)
@pytest.mark.parametrize("spec", OPERATORS, ids=str)
def test_a_state_has_the_size_that_the_backend_says(spec: Spec, room: Room) -> None:
    backend = CpuSimdBackend(Context())
    state = backend.build(spec, random_weights(spec)).new_state(room)  # type: ignore[attr-defined]
    arrays = [value for value in state if isinstance(value, np.ndarray)]
    assert backend.state_bytes(spec, room) == sum(array.nbytes for array in arrays)
