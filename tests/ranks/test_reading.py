"""A rank reads its share of a checkpoint from the disk, and next to nothing beyond it."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.ranks import fingerprints
from lfm2kit.transport import World
from tests.checkpoint.typed import Cli
from tests.core.small import FIELDS

WIDE = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16, "vocab_size": 512}
LAYERS = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}


def forget(path: Path) -> None:
    """Let the system forget what it has read of a file; skip the test if it does not."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if resident(path):
        pytest.skip("files stay in memory here")


def resident(path: Path) -> int:
    """Return how many bytes of a file the system holds in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as here:
        data = np.frombuffer(here, np.uint8)
        pages = (ctypes.c_ubyte * -(-len(data) // mmap.PAGESIZE))()
        address, length = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data))
        if ctypes.CDLL(None, use_errno=True).mincore(address, length, pages):
            pytest.skip("needs mincore")
        del data
        return mmap.PAGESIZE * sum(page & 1 for page in pages)


@pytest.fixture(params=["m.bin", "folder"])
def weights(request: pytest.FixtureRequest, tmp_path: Path, cli: Cli) -> Path:
    """Return the file with the weights of a model of 29 MB, in each of our layouts."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FIELDS | WIDE | LAYERS))
    model = tmp_path / request.param
    done = cli("convert", config, model, "--random", "--dtype", "F32")
    assert done.code == 0, done
    if model.is_dir():
        (path,) = model.glob("*.safetensors")
        return path
    return model


class OneOfFour:
    """The transport of rank 1 of four that are not there."""

    world = World.of(1, [0] * 4)

    def barrier(self) -> None:
        pass

    def all_to_all(self, rows: Any, send_counts: Any, *known: Any) -> Any:
        return rows, send_counts


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
@pytest.mark.parametrize("backend", ["cpu_simd", "reference"])
def test_a_rank_reads_a_hundredth_of_the_file_beyond_its_share_at_most(
    weights: Path, backend: str
) -> None:
    model = weights.parent if weights.suffix == ".safetensors" else weights
    transport: Any = OneOfFour()
    forget(weights)
    checkpoint = open_checkpoint(model, [])
    setup = set_up(checkpoint, Options(backend=backend, threads=1), transport=transport)
    setup.build()
    names = setup.placed.spec.parameters()
    mine = sum(checkpoint.weights[name].nbytes for name in names)
    assert mine < 0.4 * weights.stat().st_size
    assert resident(weights) - mine <= 0.01 * weights.stat().st_size


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_comparing_a_large_model_reads_the_pages_of_a_few_rows(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "WHOLE_MODEL", 0)
    model = weights.parent if weights.suffix == ".safetensors" else weights
    forget(weights)
    checkpoint = open_checkpoint(model, [])
    fingerprints.of_model(checkpoint)
    rows = 3 * len(checkpoint.weights)
    header = 100_000
    assert resident(weights) <= 2 * mmap.PAGESIZE * rows + header
