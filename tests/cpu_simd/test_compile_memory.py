"""Kernels are not compiled where memory is too little for it: LLVM would end the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lfm2kit_cpu_simd.threads import threading_notes


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_too_little_memory_to_compile_is_an_error_that_says_so(tmp_path: Path) -> None:
    command = f"ulimit -d 250000 && exec '{sys.executable}' -m lfm2kit run -v --backend cpu_simd"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "LFM2KIT_CACHE_DIR": str(tmp_path)},  # no kernel is there
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    *notes, line = done.stderr.splitlines()
    assert len(notes) == len(threading_notes())
    assert "compiling kernels takes at least 200 MB of memory" in line
    assert "--backend reference" in line
