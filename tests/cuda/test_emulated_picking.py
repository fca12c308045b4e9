"""Rows picked by the ids in them, and put back, on the CPU, where CUDA threads take turns."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.emulated_operators import compiled

MARGIN, POISON = 64, np.frombuffer(b"\xa5" * 4, np.int32)[0]  # as in emulated/picking.cpp
EXPERTS = 12


@pytest.fixture(scope="module")
def picking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("picking"), "picking", VECTOR=1)


@pytest.mark.parametrize(
    ("rows", "ctas", "wanted"),
    [(0, 1, (1,)), (1, 1, (2, 3)), (37, 1, (5,)), (37, 3, ()), (37, 5, tuple(range(EXPERTS))),
     (1100, 2, (0, 7, 11)), (40, 64, (3, 4))],
)  # fmt: skip
def test_rows_with_a_wanted_id_are_picked_in_their_order_and_put_back(
    picking: Path, rows: int, ctas: int, wanted: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(rows)
    ids = rng.integers(-1, EXPERTS + 2, (rows, 3)).astype(np.int32)
    table = np.zeros(max(wanted, default=-1) + 1, np.int32)
    table[list(wanted)] = 1
    a, b = (rng.integers(0, 2**31, (rows, words)).astype(np.int32) for words in (19, 4))
    numbers = [ctas, rows, 3, len(table), 19, 4]
    out = subprocess.run(
        [str(picking), *map(str, numbers)], check=True, timeout=300, stdout=subprocess.PIPE,
        input=b"".join(array.tobytes() for array in (ids, table, a, b)),
    ).stdout  # fmt: skip
    found, left = [], np.frombuffer(out, np.int32)
    for size in (1, rows, a.size, b.size, a.size):
        array, margin, left = np.split(left, [size, size + MARGIN])
        assert (margin == POISON).all()
        found.append(array)
    count, places, picked_a, picked_b, back = found
    is_picked = np.isin(ids, wanted).any(axis=1)
    assert count[0] == is_picked.sum()
    np.testing.assert_array_equal(
        places, np.where(is_picked, np.cumsum(is_picked) - 1, -1).astype(np.int32)
    )
    for picked, array in ((picked_a, a), (picked_b, b)):
        some = array[is_picked].reshape(-1)
        np.testing.assert_array_equal(picked[: len(some)], some)
        assert (picked[len(some) :] == POISON).all()
    np.testing.assert_array_equal(back.reshape(a.shape), np.where(is_picked[:, None], a, 0))
