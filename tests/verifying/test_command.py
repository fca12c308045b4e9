"""`lfm2kit verify`: what it prints, its exit codes, its traces, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.typed import Cli
from tests.records.validating import faults

SAMPLES = ("--random-inputs", "5", "-n", "2")


def traced(cli: Cli, random_folder: Path, file: Path) -> dict[str, Any]:
    """Return the arrays of a trace that the command has written."""
    given = ("--model", str(random_folder), "--write-trace", str(file), *SAMPLES)
    assert cli("verify", *given, "-b", "reference").code == 0
    with np.load(file) as arrays:
        return dict(arrays)


def test_equal_backends_end_well(cli: Cli, random_folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = cli("verify", "--model", str(random_folder), *SAMPLES, "--json", str(record))
    assert done.code == 0
    assert done.out.splitlines()[-1].startswith(
        "EQUAL: all 36 blocks are as near to those of 'reference'"
    )
    written = json.loads(record.read_text(encoding="utf-8"))
    assert faults(written) == []
    assert written["first"] is None
    assert len(written["blocks"]) == 3 * 36


def test_a_trace_of_a_model_agrees_with_it(cli: Cli, random_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"
    arrays = traced(cli, random_folder, file)
    assert arrays["token_ids"].shape == (2, 5)
    assert arrays["layers.7"].shape == (10, 128)
    done = cli("verify", "--model", str(random_folder), "--against", str(file))
    assert done.code == 0
    assert "EQUAL" in done.out


def test_a_layer_that_a_trace_has_otherwise_is_named(
    cli: Cli, random_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.npz"
    arrays = traced(cli, random_folder, file)
    arrays["layers.3"][7, 5] += 0.01
    np.savez(file, **arrays)
    record = tmp_path / "record.json"
    words = ("--against", str(file), "--json", str(record))
    done = cli("verify", "--model", str(random_folder), *words)
    assert faults(json.loads(record.read_text(encoding="utf-8"))) == []
    assert done.code == 1
    assert "DIFFERENT: layers.3, the layer block of backend 'cpu_simd'" in done.out
    assert "sample 1, token 2, column 5" in done.out
    again = f"lfm2kit verify --backend cpu_simd,3=reference:fp32 --model {random_folder} --against"
    assert again in done.out


LAYERS = tuple(f"layers.{i}" for i in range(8))
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"token_ids": None}, "there is no array 'token_ids'"),
    "ids beyond": ({"token_ids": np.full((2, 5), 9999)}, "token id 9999; the model's are from 0"),
    "no samples": ({"token_ids": np.zeros((0, 5), np.int32)}, "expected integers [n, seq_len]"),
    "a layer short": (
        {"layers.3": np.zeros((3, 128), np.float32)},
        "'layers.3' is float32",
    ),
    "not a number": (
        {"layers.3": np.full((10, 128), np.nan, np.float32)},
        "'layers.3' holds NaN or infinities",
    ),
    "a layer more": (
        {"layers.8": np.zeros((10, 128), np.float32)},
        "'layers.8' is not of this model's trace; the model has 8 layers",
    ),
    "no logits": ({"logits": None}, "there is no array 'logits'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_trace_that_does_not_fit_is_one_line(
    bad: str, cli: Cli, random_folder: Path, tmp_path: Path
) -> None:
    changes, says = BAD[bad]
    file = tmp_path / "trace.npz"
    arrays = {"token_ids": np.zeros((2, 5), np.int32), "logits": np.zeros((2, 1024), np.float32)}
    arrays |= {name: np.zeros((10, 128), np.float32) for name in ("embed_tokens", *LAYERS)}
    np.savez(file, **{k: v for k, v in (arrays | changes).items() if v is not None})
    done = cli("verify", "--model", str(random_folder), "--against", str(file))
    done.assert_fails(says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a file of NumPy arrays"),
        (b"PK\x03\x04 cut", "not a file of NumPy arrays"),
        (b"\x93NUMPY\x01\x00", "not a file of NumPy arrays"),
    ],
)
def test_a_file_that_is_no_trace_is_one_line(
    content: bytes, says: str, cli: Cli, random_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.npz"
    file.write_bytes(content)
    done = cli("verify", "--model", str(random_folder), "--against", str(file))
    done.assert_fails(says)


def test_objects_in_a_trace_are_not_unpickled(
    cli: Cli, random_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "trace.npz"
    np.savez(file, token_ids=np.array([{"a": 1}], dtype=object))
    done = cli("verify", "--model", str(random_folder), "--against", str(file))
    done.assert_fails("not a file of NumPy arrays")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--against", "referense"), "Did you mean 'reference'?"),
        (("--against", "nowhere.npz"), "nowhere.npz: No such file"),
        (("--against", "t.npz", "-n", "3"), "-n 3: the trace t.npz has its own samples"),
        (("--against", "cpu_simd", "--write-trace", "u.npz"), "nothing is compared"),
        (("--write-trace", "no/such/folder.npz"), "no/such"),
        (("--write-trace", "trace.txt"), "call it trace.txt.npz"),
        (("--random-inputs", "0"), "--random-inputs 0"),
    ],
)
def test_bad_input_is_one_line(
    given: tuple[str, ...], says: str, cli: Cli, random_folder: Path
) -> None:
    has_none = given[0] == "--against" and given[1].endswith("npz")
    samples = () if has_none or "--random-inputs" in given else SAMPLES
    done = cli("verify", "--model", str(random_folder), *samples, *given)
    done.assert_fails(says)
