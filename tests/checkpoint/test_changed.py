"""A mapped file that is written to is named before wrong values, or a crash, come of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2kit.building.loading import EMBEDDED, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.convert import source_of, write_checkpoint
from lfm2kit.errors import Lfm2kitError

NAME = "model.safetensors"


def truncated(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(100)


def overwritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(1, 1))  # a clock that is coarse would show no change


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(EMBEDDED / "tiny", tmp_path / "model")


@pytest.mark.parametrize("changed", [truncated, overwritten])
@pytest.mark.parametrize("blocks_before", [0, 3])
def test_it_is_named_before_the_next_block_is_built(
    folder: Path, changed: Callable[[Path], None], blocks_before: int
) -> None:
    setup = set_up(open_checkpoint(folder), Options(backend="reference"))
    if blocks_before == 0:
        changed(folder / NAME)
    left = [blocks_before]

    def built(leaf: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            changed(folder / NAME)

    with pytest.raises(Lfm2kitError, match=rf"{NAME}: the file was written to while it was in use"):
        setup.build(built)
    assert left == [0]


def test_another_file_that_takes_its_name_does_no_harm(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    shutil.copy(folder / NAME, folder / "new")
    truncated(folder / "new")
    os.replace(folder / "new", folder / NAME)
    set_up(checkpoint, Options(backend="reference")).build()
    (folder / NAME).unlink()
    set_up(checkpoint, Options(backend="reference")).build()


def test_it_is_named_in_the_midst_of_a_conversion(folder: Path, tmp_path: Path) -> None:
    source = source_of(open_checkpoint(folder))
    with pytest.raises(Lfm2kitError, match=f"{NAME}: the file was written to"):
        write_checkpoint(source, tmp_path / "there", done=lambda _: overwritten(folder / NAME))
    assert not (tmp_path / "there").exists()


CHANGED_IN_THE_RUN = """
import sys
from pathlib import Path
from lfm2kit.__main__ import main
from lfm2kit.model import LFM2

forward, calls = LFM2.logits, []

def logits(model, *arguments):
    calls.append(1)
    logits = forward(model, *arguments)
    if len(calls) == 2:
        path = Path(sys.argv[3], "model.safetensors")
        path.open("r+b").truncate(100)
    return logits

LFM2.logits = logits
main()
"""


def test_a_run_whose_model_is_cut_short_ends_with_one_line(folder: Path) -> None:
    command = ["run", "-m", str(folder), "-b", "reference", "-n", "4", "--batch-size", "1"]
    done = subprocess.run(
        [sys.executable, "-c", CHANGED_IN_THE_RUN, *command], capture_output=True, text=True
    )
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert "the file was written to while it was in use" in line
    assert "Elapsed" not in done.stdout
