"""A backend with a fault on rank 1, as a distribution that `lfm2kit` finds: see `install`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lfm2kit
from lfm2kit.backend import Block, Context, Weights
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Spec

FAULT = "FAULTY"  # in the environment: which of the faults below


def raising(error: BaseException) -> None:
    raise error


def holding_the_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)


def for_ever() -> None:
    while True:
        pass


FAULTS: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "raises": lambda: raising(RuntimeError("the second rank fails")),
    "raises-in-build": lambda: raising(RuntimeError("no block of this")),
    "users-error": lambda: raising(lfm2kit.Lfm2kitError("this rank has no such file")),
    "out-of-memory": lambda: raising(MemoryError("Unable to allocate 1.00 PiB")),
    "exits-at-once": lambda: os._exit(0),
    "exits": lambda: sys.exit(0),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loops": for_ever,
    "holds-the-lock": holding_the_lock,
    "never-joins": lambda: None,  # see `SITE`
}


# Python runs it before anything else.
SITE = """
import os, time
ranks = [os.environ.get(name) for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")]
if os.environ.get("FAULTY") == "never-joins" and "1" in ranks:
    time.sleep(1000)
"""


class Faulty(ReferenceBackend):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.fault = os.environ[FAULT] if context.local_rank == 1 else ""

    def build(self, spec: Spec, weights: Weights) -> Block:
        if self.fault.endswith("-in-build"):
            FAULTS[self.fault]()
        block = super().build(spec, weights)
        if not self.fault:
            return block

        def failing(*inputs: Any) -> Any:
            FAULTS[self.fault]()
            return block(*inputs)

        return failing


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[lfm2kit.BackendPlugin]:
    yield lfm2kit.BackendPlugin("faulty", "fails on rank 1", Faulty, api_version=1)


def install(folder: Path) -> str:
    """Make a distribution of this file in `folder`; what PYTHONPATH must be for it."""
    (folder / "faulty_plugin.py").write_text(Path(__file__).read_text())
    (folder / "sitecustomize.py").write_text(SITE)
    info = folder / "faulty_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lfm2kit]\nfaulty = faulty_plugin\n")
    return str(folder)
