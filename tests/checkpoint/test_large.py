"""LFM2-8B-A1B in float32: 33 GB, all but one expert a hole in the file.  Opened and read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lfm2kit.checkpoint.huggingface import DOWN, GATE_UP, SINGLE
from lfm2kit.checkpoint.safetensors import header_bytes
from lfm2kit.checkpoint.synth import LFM2_8B, random_source
from lfm2kit.formats import F32
from tests.checkpoint.test_model_bin import row, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for peaks of memory")

Shapes = dict[str, tuple[int, ...]]
MOST = 120  # MB resident at any time: Python and NumPy take 30 of them, the expert 15

EXPERT = "layers.23.feed_forward.experts.31.w2.weight"
VALUES = np.full((2048, 1792), 0.5, np.float32)
READ_THE_EXPERT = f"""
import sys
from pathlib import Path
from lfm2kit.checkpoint import open_checkpoint
weights = open_checkpoint(Path(sys.argv[1])).weights
print(len(weights), weights.float32({EXPERT!r}).sum())
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) // 1000)  # MB: the most that was ever resident
"""


def apart() -> Shapes:
    """Return the model's tensors, the expert last so that its values are at the file's end."""
    shapes = dict(random_source(LFM2_8B).shapes)
    shapes[EXPERT] = shapes.pop(EXPERT)
    return shapes


def packed() -> Shapes:
    shapes = {name: shape for name, shape in apart().items() if ".experts." not in name}
    for i in range(2, 24):
        shapes[f"layers.{i}.feed_forward{GATE_UP}"] = (32, 2 * 1792, 2048)
        shapes[f"layers.{i}.feed_forward{DOWN}"] = (32, 2048, 1792)
    return shapes


def sizes(shapes: Shapes) -> list[int]:
    return [4 * int(np.prod(shape, dtype=int)) for shape in shapes.values()]


def write(path: Path, head: bytes, shapes: Shapes) -> None:
    """Write the head, a hole where all data but the last would be, and the expert's values."""
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + sum(sizes(shapes)) - VALUES.nbytes)
        file.write(VALUES.tobytes())


def safetensors_folder(folder: Path, shapes: Shapes) -> Path:
    (folder / "config.json").write_text(json.dumps(dict(LFM2_8B)))
    write(folder / SINGLE, header_bytes((f"model.{n}", F32, s) for n, s in shapes.items()), shapes)
    return folder


def experts_apart(folder: Path) -> Path:
    return safetensors_folder(folder, apart())


def experts_packed(folder: Path) -> Path:
    return safetensors_folder(folder, packed())


def model_bin(folder: Path) -> Path:
    shapes = apart()
    offset = len(table(*(row(name.encode(), list(s), 0, 0) for name, s in shapes.items())))
    rows = []
    for (name, shape), size in zip(shapes.items(), sizes(shapes), strict=True):
        rows.append(row(name.encode(), list(shape), offset, size))
        offset += size
    write(folder / "model.bin", table(*rows), shapes)
    return folder / "model.bin"


@pytest.mark.parametrize("made", [experts_apart, experts_packed, model_bin])
def test_an_expert_of_33_gb_is_read_in_little_memory(
    tmp_path: Path, made: Callable[[Path], Path]
) -> None:
    path = made(tmp_path)
    assert max(p.stat().st_size for p in tmp_path.iterdir()) > 33e9
    read = [sys.executable, "-c", READ_THE_EXPERT, str(path)]
    done = subprocess.run(read, capture_output=True, text=True, check=True)
    tensors, total, peak = done.stdout.split()
    assert (int(tensors), float(total)) == (2302, VALUES.sum())
    assert int(peak) < MOST
