"""Kernels are kept from run to run, and compiled again where they cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lfm2kit_int8 import compiling
from numba import types

from lfm2kit.kernel_cache import KernelCache


def doubled(x: int) -> int:
    """Return 2 * x by a kernel that is compiled or read as if in a new process."""
    compiling.KERNELS = KernelCache("int8")

    @compiling.kernel(types.int64(types.int64))
    def double(x: Any) -> Any:
        return 2 * x

    return int(double(x))


def test_a_kernel_is_compiled_once_and_again_if_its_file_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LFM2KIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "KERNELS", compiling.KERNELS)  # given back at the end
    with compiling.announced():
        assert doubled(3) == 6
    assert capsys.readouterr().err == "int8: compiling kernels for this CPU ...\n"
    (kept,) = (tmp_path / "int8").iterdir()
    written = kept.stat()
    with compiling.announced():
        assert doubled(3) == 6
    assert kept.stat().st_ino == written.st_ino
    assert capsys.readouterr().err == ""
    kept.write_bytes(kept.read_bytes()[:-1])
    assert doubled(3) == 6
    assert kept.stat().st_size == written.st_size
    assert "such kernels are compiled again" in capsys.readouterr().err


def test_a_kernel_depends_on_settings_that_change_machine_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fingerprint(name: str) -> str:
        with monkeypatch.context() as patched:
            patched.setenv(name, "2")
            return compiling.fingerprint.__wrapped__()

    assert fingerprint("NUMBA_NUM_THREADS") == compiling.fingerprint.__wrapped__()
    assert fingerprint("NUMBA_OPT") != compiling.fingerprint.__wrapped__()
