"""The tracer as users run it: in a process of its own, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lfm2kit_trace
import pytest

from lfm2kit.specs import MLP


def run(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lfm2kit", "run", "--backend", "reference", "-n", "2"]
    environment = {**os.environ, "LFM2KIT_TRACE": target}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)


def test_without_the_variable_no_block_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LFM2KIT_TRACE", raising=False)
    assert lfm2kit_trace.lfm2kit_block_wrapper("layers.0.feed_forward", MLP(4, 8)) is None


def test_the_trace_has_every_call_and_parts_lie_inside_their_whole(tmp_path: Path) -> None:
    done = run(str(tmp_path / "trace.json"), "--batch-size", "1", "-v")
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"X"}
    assert sum(event["name"] == "model" for event in events) == 2
    assert sum(event["name"] == "layers.2.feed_forward.router" for event in events) == 2
    layer, operator = (
        next(event for event in events if event["name"] == name)
        for name in ("layers.0", "layers.0.operator")
    )
    assert operator["cat"] == "conv"
    assert layer["ts"] <= operator["ts"]
    assert operator["ts"] + operator["dur"] <= layer["ts"] + layer["dur"]
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]


def test_the_totals_of_each_kind_go_to_stderr_longest_first(tmp_path: Path) -> None:
    lines = [line.split() for line in run(str(tmp_path / "t.json")).stderr.splitlines()]
    totals = {line[0]: float(line[3]) for line in lines if line[2:3] == ["calls"]}
    assert next(iter(totals)) == "model"
    assert {"layer", "conv", "attn", "mlp", "router", "experts", "norm", "head"} <= set(totals)
    assert list(totals.values()) == sorted(totals.values(), reverse=True)


def test_the_process_id_can_be_part_of_the_name(tmp_path: Path) -> None:
    assert run(str(tmp_path / "trace-%p.json")).returncode == 0
    (written,) = tmp_path.iterdir()
    assert written.stem.removeprefix("trace-").isdigit()


@pytest.mark.parametrize("target", ["missing/trace.json", "."])
def test_a_path_that_cannot_be_written_is_one_line_before_anything_runs(
    tmp_path: Path, target: str
) -> None:
    done = run(str(tmp_path / target))
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if "LFM2KIT_TRACE=" in line)
    assert "no file can be written there" in line
    assert "Traceback" not in done.stderr
    assert "Elapsed" not in done.stdout
