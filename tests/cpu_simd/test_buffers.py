"""Memory that stays between kernels, and that nobody else sees."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend
from lfm2kit_cpu_simd.buffers import Buffers

from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.building.loading import load_model
from lfm2kit.formats import BF16, F32, Format
from lfm2kit.specs import RMSNorm, Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.compare import each
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights, stored_as

BLOCKS = [spec for kind, cases in CASES.items() if kind != "layer" for spec in cases]


def test_a_role_keeps_its_memory_and_grows() -> None:
    buffers = Buffers()
    first = buffers.array("projected", 4, 5)
    assert buffers.array("projected", 2, 10).ctypes.data == first.ctypes.data
    assert buffers.array("projected", 3, 3).shape == (3, 3)
    assert not np.shares_memory(buffers.array("heads", 4, 5), first)
    assert buffers.array("projected", 100, 5).size == 500
    assert buffers.array("projected", 0, 5).shape == (0, 5)


@pytest.mark.parametrize(
    "roles_of_a_block",
    [
        ("projected", "heads", "keys", "values"),
        ("projected", "gated"),
        ("gathered", "inner", "outputs"),
    ],
)
def test_no_two_roles_of_a_block_share_memory(roles_of_a_block: tuple[str, ...]) -> None:
    buffers = Buffers()
    places = [buffers.array(role, 10).ctypes.data for role in roles_of_a_block]
    assert len(set(places)) == len(places)


def test_another_thread_has_memory_of_its_own() -> None:
    buffers = Buffers()
    here = buffers.array("inner", 10)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(buffers.array, "inner", 10).result()
    assert not np.shares_memory(here, there)


def test_logits_keep_their_values_while_another_model_runs() -> None:
    one, two = load_model("tiny", "cpu_simd"), load_model("tiny", "cpu_simd")
    first = one.logits(Batch.of_sequences([range(16)]))
    kept = first.copy()
    two.logits(Batch.of_sequences([range(20, 60), range(7)]))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("format", [F32, BF16], ids=str)
@pytest.mark.parametrize("spec", BLOCKS, ids=str)
def test_a_result_is_no_view_of_a_buffer_a_weight_or_an_argument(
    spec: Spec, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the residual stream, which a norm may add to in place."""
    buffers = recorded_buffers(monkeypatch)
    weights = stored_as(random_weights(spec), format)
    block = CpuSimdBackend(Context()).build(spec, weights)
    for rows in (1, 17):
        inputs = random_inputs(spec, np.random.default_rng(0), rows)
        results = each(block(*inputs))
        arguments = list(arrays_of(inputs[1:] if isinstance(spec, RMSNorm) else inputs))
        others = [*buffers, *(t.data for t in weights.values()), *arguments]
        assert not any(np.may_share_memory(a, b) for a in results for b in others)


def recorded_buffers(monkeypatch: pytest.MonkeyPatch) -> list[npt.NDArray[np.float32]]:
    """Return a list of all arrays that blocks take from buffers from now on."""
    arrays: list[npt.NDArray[np.float32]] = []
    array = Buffers.array

    def recording(self: Buffers, role: str, *shape: int) -> npt.NDArray[np.float32]:
        arrays.append(array(self, role, *shape))
        return arrays[-1]

    monkeypatch.setattr(Buffers, "array", recording)
    return arrays


def arrays_of(inputs: tuple[Any, ...]) -> Iterator[npt.NDArray[Any]]:
    for value in inputs:
        if isinstance(value, Batch):
            yield from (value.token_ids, value.positions, value.cu_seqlens, value.logits_rows)
        elif value is not None:
            yield value
