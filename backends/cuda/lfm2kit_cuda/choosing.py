"""Which GPU a process works on, what tells that GPU from every other one, and what it is.

Needs the driver, but neither CuPy nor a context on any GPU.
"""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from lfm2kit.backend import Context
from lfm2kit.errors import Lfm2kitError

NAME_BYTES, UUID_BYTES = 256, 16
DRIVER = Path("/proc/driver/nvidia/version")


def device_for(context: Context, visible: int, current: int) -> int:
    """Return the number of the device to work on, of the `visible` ones.

    A process that is alone works on the `current` device.  The ranks of a machine are dealt out
    over the devices that they see.  So each has its own where all see all of them, and also where
    each sees only its own, as under `srun --gpus-per-task=1`.  A rank cannot tell by itself whether
    the others see the same devices: Slurm may call each of them device 0.  Before the ranks start
    they compare what `identity` returns, and are refused if two are the same.
    """
    return context.local_rank % visible if context.local_ranks > 1 else current


def identity(device: int) -> str:
    """Return the name and the UUID of a device, which no other device of any machine has.

    The parts that a GPU is divided into (MIG) have UUIDs of their own.
    """
    name, uuid = _described(device)
    return f"{name} with UUID {uuid}"


def hardware(device: int, driver: Path = DRIVER) -> dict[str, str]:
    """Return the name of a device, and the version of its driver where the system says it."""
    names = {"device": _described(device)[0]}
    with suppress(OSError):
        version = re.search(r"\b[0-9]+\.[0-9.]*[0-9]\b", driver.read_text())
        if version is not None:
            names["driver"] = version[0]
    return names


def _described(device: int) -> tuple[str, UUID]:
    """Return the name and the UUID of a device."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_int()
    name = ctypes.create_string_buffer(NAME_BYTES)
    uuid = ctypes.create_string_buffer(UUID_BYTES)
    status = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), device)
        or driver.cuDeviceGetName(name, NAME_BYTES, handle)
        or driver.cuDeviceGetUuid_v2(uuid, handle)
    )
    if status:
        raise Lfm2kitError(f"the NVIDIA driver does not describe device {device} (error {status})")
    return name.value.decode(), UUID(bytes=uuid.raw)
