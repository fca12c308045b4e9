"""The tracer as users run it: in a process of its own, through the command line."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lfm2kit_trace
import pytest

import lfm2kit
from lfm2kit.backend import HOST, HostMemory
from lfm2kit.specs import MLP


def run(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lfm2kit", "run", "--backend", "reference", "-n", "2"]
    environment = {**os.environ, "LFM2KIT_TRACE": target}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)


def test_without_the_variable_no_block_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LFM2KIT_TRACE", raising=False)
    assert lfm2kit_trace.lfm2kit_block_wrapper("layers.0.feed_forward", MLP(4, 8), HOST) is None


def test_the_trace_has_every_call_and_parts_lie_inside_their_whole(tmp_path: Path) -> None:
    done = run(str(tmp_path / "trace.json"), "--batch-size", "1")
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["memory host"]
    events = [event for event in events if event["ph"] == "X"]
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


def test_commands_that_build_no_model_write_no_trace(tmp_path: Path) -> None:
    environment = {**os.environ, "LFM2KIT_TRACE": str(tmp_path / "trace.json")}
    command = [sys.executable, "-m", "lfm2kit", "plan", "--backend", "reference"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, list(tmp_path.iterdir())) == (0, []), done.stderr


# ---- the command ----


def summary(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lfm2kit", "trace-summary", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_summary_says_what_was_run_and_what_took_how_long(tmp_path: Path) -> None:
    run(str(tmp_path / "trace.json"))
    done = summary(tmp_path / "trace.json")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["backend:", "reference"] in lines
    kinds = {line[0]: line for line in lines if "calls" in line}
    assert kinds["model"][-1] == "100.0%"
    assert {"layer", "conv", "router"} <= set(kinds)
    assert "layers.2.feed_forward.router" in summary("--blocks", tmp_path / "trace.json").stdout


@pytest.mark.parametrize("content", [None, "", "[]", '{"traceEvents": [{"ph": "X"}]}'])
def test_a_file_that_is_no_trace_is_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(lfm2kit.Lfm2kitError, match=r"trace\.json: (not a trace|No such file)"):
        lfm2kit_trace.trace_summary(path)


# ---- a memory with marks of its own ----


class Device(HostMemory):
    """An ordered memory whose clock shows another time than the host's."""

    name = "device"

    def __init__(self) -> None:
        self.now = 100.0

    def mark(self) -> lfm2kit_trace.HostMark:
        return lfm2kit_trace.HostMark(self.now)

    def _unused(self, *arguments: Any) -> Any:
        raise NotImplementedError

    stream = wait = start_to_host = _unused


def test_a_block_in_an_ordered_memory_is_timed_by_its_marks(tmp_path: Path) -> None:
    device: Any = Device()
    trace = lfm2kit_trace.Trace(tmp_path / "trace.json")

    def block(seconds: float) -> None:
        device.now += seconds

    wrapper = trace.wrapper("lm_head", "head", device)
    assert not wrapper.survives_capture
    traced = wrapper.wrap(block)
    for seconds in (2.0, 3.0):
        traced(seconds)
    trace.write()
    atexit.unregister(trace.write)
    first, second = (e for e in trace.events if e["ph"] == "X")
    assert (first["dur"], second["dur"]) == (2e6, 3e6)
    assert second["ts"] - first["ts"] == pytest.approx(2e6)


def test_marks_are_not_kept_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfm2kit_trace, "MOST_PENDING", 3)
    trace = lfm2kit_trace.Trace(tmp_path / "trace.json")
    traced = trace.wrapper("lm_head", "head", HOST).wrap(lambda: None)
    for _ in range(10):
        traced()
        assert len(trace._pending) <= 3
    trace.write()
    atexit.unregister(trace.write)
    assert len(trace.events) == 10
