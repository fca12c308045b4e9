"""What the backend needs of a machine: a driver with a device, CuPy, and NVRTC."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

from lfm2kit_cuda import nvrtc

SUCCESS, NO_DEVICE = 0, 100


def why_unavailable() -> str | None:
    """Return the first thing that is missing, or None.  It asks the driver, not CuPy."""
    reason = _why_no_device()
    if reason is None and find_spec("cupy") is None:
        reason = "CuPy is not installed; pip install cupy-cuda13x"
    return reason or nvrtc.why_unavailable()


def _why_no_device() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    status, count = driver.cuInit(0), ctypes.c_int()
    if status == SUCCESS:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status not in (SUCCESS, NO_DEVICE):
        return f"the NVIDIA driver does not start (CUDA error {status})"
    return None if count.value else "there is no CUDA device"
