"""Where something is missing, the backend says what, in a line; importing it is free."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest
from lfm2kit_cuda import requirements


class Driver:
    """A libcuda.so.1 that answers as told."""

    def __init__(self, status: int, devices: int) -> None:
        self.status = status
        self.devices = devices

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (None, "there is no NVIDIA driver (libcuda.so.1)"),
        (Driver(100, 0), "there is no CUDA device"),
        (Driver(0, 0), "there is no CUDA device"),
        (Driver(999, 0), "the NVIDIA driver does not start (CUDA error 999)"),
    ],
)
def test_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, sentence: str
) -> None:
    with_driver(monkeypatch, driver)
    assert requirements.why_unavailable() == sentence


def test_a_device_without_cupy_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, Driver(0, 1))
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    assert "pip install cupy" in str(requirements.why_unavailable())


def test_announcing_the_backend_imports_nothing_heavy() -> None:
    code = (
        "import sys, lfm2kit_cuda; list(lfm2kit_cuda.lfm2kit_backends());"
        "assert not {'cupy', 'numba'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
