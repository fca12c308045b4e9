"""A kernel that several threads launch at once gets the arguments of each launch, whole."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from lfm2kit_cuda import launching
from lfm2kit_cuda.launching import Launch

INVALID_VALUE = 1


class Driver:
    """A cuLaunchKernelEx that takes its time to read: other threads run meanwhile."""

    def __init__(self, kinds: Sequence[Any], status: int = 0) -> None:
        self.kinds = kinds
        self.status = status
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, config: Any, function: Any, pointers: Any, extra: Any) -> int:
        time.sleep(0.001)
        read = config._obj
        values = [
            ctypes.cast(pointer, ctypes.POINTER(kind))[0]
            for pointer, kind in zip(pointers, self.kinds, strict=True)
        ]
        early = read.attributes[0].value if read.count else 0
        self.seen.append(
            (tuple(read.grid), read.block[0], read.shared_bytes, read.stream, early, *values)
        )
        return self.status


KINDS = (ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_void_p, ctypes.c_int)


def array(address: int) -> Any:
    return SimpleNamespace(data=SimpleNamespace(ptr=address))


def driver_of(monkeypatch: pytest.MonkeyPatch, status: int = 0) -> Driver:
    driver = Driver(KINDS, status)
    monkeypatch.setattr(launching, "_driver_launch", lambda: driver)
    return driver


@pytest.mark.parametrize("early", [False, True])
def test_the_driver_reads_what_a_launch_was_given(
    monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    driver = driver_of(monkeypatch)
    launch = Launch(99, 1024, early=early)
    big = 2**63 + 8
    assert launch((3, 2), 128, (array(big), -5, 0.5, None, True), 77) == 0
    assert launch((7,), 64, (None, 6, -2.0, array(16), False), 0) == 0
    first, second = driver.seen
    assert first == ((3, 2, 1), 128, 1024, 77, int(early), big, -5, 0.5, None, 1)
    assert second == ((7, 1, 1), 64, 1024, None, int(early), None, 6, -2.0, 16, 0)


def test_two_threads_launch_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of(monkeypatch)
    launch = Launch(99, 0, early=False)

    def launches(number: int) -> None:
        for i in range(25):
            values = array(1000 * number + i), i, 0.5 * number, array(number), number
            launch((number, i + 1), 32 * number, values, 100 + number)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(launches, (1, 2)))
    assert sorted(driver.seen) == [
        ((n, i + 1, 1), 32 * n, 0, 100 + n, 0, 1000 * n + i, i, 0.5 * n, n, n)
        for n in (1, 2)
        for i in range(25)
    ]


def test_the_drivers_status_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_of(monkeypatch, INVALID_VALUE)
    assert Launch(99, 0, early=False)((1,), 1, (None, 1, 1.0, None, 1), 0) == INVALID_VALUE
