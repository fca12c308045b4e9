"""Kernels that are launched early wait for the one before, as dependent.cuh promises."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lfm2kit_cuda import nvrtc
from lfm2kit_cuda.compiling import OPTIONS, SOURCES, definitions, waits_for_previous

from tests.cuda.test_compiling import KERNELS, marks

pytestmark = pytest.mark.skipif(
    nvrtc.why_unavailable() is not None, reason=str(nvrtc.why_unavailable())
)


def ptx(stem: str, architecture: str, constants: dict[str, Any]) -> str:
    source = (SOURCES / f"{stem}.cu").read_text(encoding="utf-8")
    options = (f"--gpu-architecture={architecture}", *OPTIONS, *definitions(stem, constants))
    return nvrtc.compile_ptx(source, f"{stem}.cu", options).decode()


def kernels_in(text: str) -> dict[str, str]:
    """Return the body of each kernel by name."""
    parts = re.split(r"\.entry (\w+)\(", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


WAYS = {"gemm90": 2}  # its warpgroups part before they wait: those that copy, those that multiply
EARLY = [(stem, constants) for stem, constants, _ in KERNELS if waits_for_previous(stem)]
CASES = [pytest.param(*case, id=case[0], marks=marks(*case)) for case in EARLY]


@pytest.mark.parametrize(("stem", "constants"), CASES)
def test_every_kernel_of_an_early_source_waits(stem: str, constants: dict[str, Any]) -> None:
    kernels = kernels_in(ptx(stem, "compute_90a", constants))
    assert kernels
    ways = WAYS.get(stem, 1)
    for name, body in kernels.items():
        assert body.count("griddepcontrol.wait") >= ways, name


def test_older_chips_have_nothing_to_wait_with() -> None:
    stem, constants = EARLY[0]
    assert "griddepcontrol" not in ptx(stem, "compute_80", constants)


def test_a_source_that_does_not_promise_is_not_launched_early() -> None:
    assert not waits_for_previous("packing")
