"""The cores that are close to a GPU, as Linux says."""

from __future__ import annotations

from pathlib import Path

import pytest
from lfm2kit_cuda.near import cores_near


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0-3,8-11\n", {0, 1, 2, 3, 8, 9, 10, 11}),
        ("5\n", {5}),
        ("\n", set()),
        ("no list\n", set()),
    ],
)
def test_cores_are_read_from_linuxs_list(text: str, cores: set[int], tmp_path: Path) -> None:
    folder = tmp_path / "sys/bus/pci/devices/0000:1b:00.0"
    folder.mkdir(parents=True)
    (folder / "local_cpulist").write_text(text)
    assert cores_near("0000:1B:00.0", tmp_path) == cores


def test_a_device_that_is_not_listed_has_no_near_cores(tmp_path: Path) -> None:
    assert cores_near("0000:1B:00.0", tmp_path) == set()
