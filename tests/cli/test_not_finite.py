"""Logits that are not finite end `run` and `bench` with one line and exit code 1."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.measuring.validate import not_finite
from tests.cli.test_commands import TINY, VOCABULARY, Cli, cli

__all__ = ["cli"]

NAN = {"BF16": b"\xc0\x7f", "F16": b"\x00\x7e", "F32": b"\x00\x00\xc0\x7f"}
NORM = "model.embedding_norm.weight"


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """Return the embedded model with a NaN in its last norm."""
    folder = tmp_path / "spoilt"
    shutil.copytree(TINY, folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + size])[NORM]
    nan, at = NAN[entry["dtype"]], 8 + size + entry["data_offsets"][0]
    content[at : at + len(nan)] = nan
    path.write_bytes(content)
    return folder


def judge(done: Any, says: str) -> None:
    assert done.code == 1, done
    (line,) = [line for line in done.err.splitlines() if "error:" in line]
    assert says in line
    assert "Warning" not in done.err  # NumPy's


@pytest.mark.parametrize("validate", [(), ("-v",)])
def test_a_run_says_so_with_and_without_validation(
    cli: Cli, spoilt: Path, validate: tuple[str, ...]
) -> None:
    outputs, report = spoilt.parent / "outputs.bin", spoilt.parent / "report.json"
    files = ("--outputs", outputs, "--json", report)
    done = cli("run", "--model", spoilt, "-b", "reference", "-n", 2, *files, *validate)
    count = 2 * VOCABULARY
    judge(
        done, f"{count} of {count} logits are not finite, the first is nan at sample[0], vocab[0]"
    )
    assert "\nVALID" not in done.out
    assert ("INVALID" in done.out) == bool(validate)
    assert json.loads(report.read_text())["finite"] is False
    assert np.isnan(np.fromfile(outputs, "<f4")[2:]).all()  # written all the same


def test_a_sound_run_is_finite_in_its_report(cli: Cli, tmp_path: Path) -> None:
    cli("run", "-b", "reference", "-n", 1, "--json", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["finite"] is True


@pytest.mark.parametrize("mode", [(), ("--decode",)])
def test_a_benchmark_says_so_after_its_table(cli: Cli, spoilt: Path, mode: tuple[str, ...]) -> None:
    options = ("-b", "reference", "-n", "1,2", "--seq-len", 2, "-r", 1, "--json", "-")
    done = cli("bench", "--model", spoilt, *options, *mode)
    judge(done, "the results are not finite in 2 of 2 rows (reference: ")
    assert [row["finite"] for row in json.loads(done.out)["results"]] == [False, False]


def test_the_first_value_that_is_not_finite_is_named() -> None:
    logits = np.zeros((3, 5), np.float32)
    assert not_finite(logits) is None
    assert not_finite(logits[:0]) is None
    logits[1, 3], logits[2, 2] = -np.inf, np.nan
    assert str(not_finite(logits)).startswith(
        "2 of 15 logits are not finite, the first is -inf at sample[1], vocab[3]"
    )
