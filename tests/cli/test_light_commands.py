"""Commands that only look read no weights and compile nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Runs each command in this process, on a machine where nothing was compiled yet.
COMMANDS = """
import sys
from contextlib import suppress

from lfm2kit.cli import app
from lfm2kit.errors import Lfm2kitError
from lfm2kit.weights import Tensor

def read(*_):
    raise AssertionError("a weight is read")

Tensor.float32 = Tensor.stored_as = read
for backend in ("cpu_simd", "hybrid", "auto", "cuda"):
    with suppress(Lfm2kitError):  # there may be no GPU
        app(["plan", "--backend", backend, "--json", "-"], standalone_mode=False)
        print(backend, "was planned", file=sys.stderr)
new = ["backends", "new", "mine", "--into", sys.argv[1]]
for command in (["backends"], new, ["plugins"], ["env"], ["--help"], ["run", "--help"]):
    app(command, standalone_mode=False)
    print(*command, "ended", file=sys.stderr)

from numba.core import event
assert "lfm2kit_cpu_simd.machine" in sys.modules  # the backend was created
with_kernels = {"blocks", "tile", "gemm", "packing", "ceilings"}
print(sorted(with_kernels & {name.split(".")[1] for name in sys.modules if "cpu_simd." in name}))
"""


def test_plan_backends_env_and_help_read_no_weights_and_compile_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path / "mine")],
        env={**os.environ, "LFM2KIT_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ended = "cpu_simd was planned,hybrid was planned,auto was planned,backends ended"
    assert [line for line in ended.split(",") if line not in done.stderr] == []
    assert done.stdout.splitlines()[-1] == "[]"
    assert "compiling" not in done.stderr
    assert not (tmp_path / "cache").exists()
