"""A mapped file that is cut short under a thread that reads it: one line, exit code 2."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2kit.building.loading import EMBEDDED

READ_WHAT_IS_LOST = """
import sys
from pathlib import Path
from lfm2kit.cli.options import open_model
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options

path, backend = sys.argv[1:]
options = Options(model=path, backend=backend)
setup = set_up(open_model(options), options)
leaf = [leaf for leaf in setup.placed.leaves() if leaf.spec.parameters()][-1]
setup.builder().build(leaf)  # all is there yet, and what is compiled is compiled
Path(path, "model.safetensors").open("r+b").truncate(100)
for leaf in setup.placed.leaves():
    weights = setup.checkpoint.weights.scope(leaf.scope)
    block = setup.create(leaf.backend).build(leaf.spec, weights)  # past the checks
sum(tensor.float32().sum() for tensor in weights.values())
print("survived")
"""


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="x86-64 Linux alone"
)
@pytest.mark.parametrize("backend", ["reference", "cpu_simd"])  # Python's thread, and OpenMP's
def test_a_bus_error_is_one_line_whichever_thread_meets_it(tmp_path: Path, backend: str) -> None:
    folder = shutil.copytree(EMBEDDED / "tiny", tmp_path / "a \u00fc\n model")
    command = [sys.executable, "-c", READ_WHAT_IS_LOST, str(folder), backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done
    line = done.stderr.splitlines()[-1]
    assert line.startswith("lfm2kit: error: ")
    assert "a \\xfc\\n model: a file was cut short" in line
