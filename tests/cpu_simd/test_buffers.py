"""Memory that stays between kernels, and that nobody else sees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from lfm2kit_cpu_simd.buffers import Buffers

from lfm2kit.batch import Batch
from lfm2kit.loading import load_model


def test_a_role_keeps_its_memory_and_grows() -> None:
    buffers = Buffers()
    first = buffers.array("x", 4, 5)
    assert buffers.array("x", 2, 10).ctypes.data == first.ctypes.data
    assert buffers.array("x", 3, 3).shape == (3, 3)
    assert not np.shares_memory(buffers.array("y", 4, 5), first)
    assert buffers.array("x", 100, 5).size == 500
    assert buffers.array("x", 0, 5).shape == (0, 5)


def test_another_thread_has_memory_of_its_own() -> None:
    buffers = Buffers()
    here = buffers.array("x", 10)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(buffers.array, "x", 10).result()
    assert not np.shares_memory(here, there)


def test_logits_keep_their_values_while_another_model_runs() -> None:
    one, two = load_model("tiny", "cpu_simd"), load_model("tiny", "cpu_simd")
    first = one.logits(Batch.of_sequences([range(16)]))
    kept = first.copy()
    two.logits(Batch.of_sequences([range(20, 60), range(7)]))
    np.testing.assert_array_equal(first, kept)
