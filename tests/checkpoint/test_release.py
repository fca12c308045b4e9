"""Weights that a backend has packed are not in memory a second time."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from lfm2kit.building.loading import load_model
from lfm2kit.checkpoint.mapped import map_file, release

MB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_released_pages_leave_memory_and_come_back_with_their_values(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, 64 * MB, dtype=np.uint8)
    (tmp_path / "file").write_bytes(values.tobytes())
    view = map_file(tmp_path / "file")[100:].view(np.uint8)
    np.testing.assert_array_equal(view, values[100:])
    before = resident_bytes()
    release(view)
    assert before - resident_bytes() > 60 * MB
    np.testing.assert_array_equal(view, values[100:])


def test_arrays_that_are_no_map_are_left_alone() -> None:
    array = np.arange(10**6)
    release(array[5:])
    np.testing.assert_array_equal(array, np.arange(10**6))


def test_a_value_that_stands_for_many_is_released_within_its_file(tmp_path: Path) -> None:
    """A scale of a whole tensor, broadcast to its rows, has the bytes of one."""
    (tmp_path / "file").write_bytes(bytes(64 * mmap.PAGESIZE))
    scale = map_file(tmp_path / "file")[-4:].view(np.float32)[0:1]
    release(np.broadcast_to(scale, 10**6))


def test_every_tensor_is_released_once_its_block_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(
        "lfm2kit.checkpoint.mapped.release", lambda array: released.append(array.ctypes.data)
    )
    model = load_model("tiny", "reference")
    assert len(set(released)) == len(model.spec.parameters())
