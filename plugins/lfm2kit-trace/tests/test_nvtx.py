"""NVTX ranges, as a tool gets them that NVTX loads into the process (nvtx_recorder.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lfm2kit_trace import nvtx_ranges

import lfm2kit
from lfm2kit.backend import HOST
from lfm2kit.specs import MLP

COMPILER = shutil.which("cc")
RECORDER = Path(__file__).with_name("nvtx_recorder.c")
BLOCK = "layers.0.feed_forward", MLP(4, 8), HOST


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Return what a tool hears of a run, a list of words for each thing."""
    pytest.importorskip("nvtx")
    if COMPILER is None:
        pytest.skip("there is no C compiler for the tool that records ranges")
    folder = tmp_path_factory.mktemp("nvtx")
    tool, record = folder / "recorder.so", folder / "record.txt"
    command = [COMPILER, "-shared", "-fPIC", "-o", str(tool), str(RECORDER)]
    subprocess.run(command, check=True)
    variables = {
        "LFM2KIT_TRACE_NVTX": "1",
        "NVTX_INJECTION64_PATH": str(tool),
        "RECORDED": str(record),
    }
    command = [sys.executable, "-m", "lfm2kit", "run", "--backend", "reference", "-n", "1"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in record.read_text().splitlines()]


def test_each_range_has_the_path_of_its_block_and_the_category_of_its_kind(
    recorded: list[list[str]],
) -> None:
    categories = {number: kind for what, _, number, kind in named(recorded, "category")}
    pushed = {path: (domain, number) for _, domain, number, _, path in named(recorded, "push")}
    kinds = {path: categories[number] for path, (_, number) in pushed.items()}
    assert {domain for domain, _ in pushed.values()} == {"lfm2kit"}
    assert kinds["model"] == "model"
    assert kinds["layers.0.operator"] == "conv"
    assert kinds["layers.2.feed_forward.router"] == "router"


def test_kinds_have_colours(recorded: list[list[str]]) -> None:
    colours = {path: int(colour, 16) for *_, colour, path in named(recorded, "push")}
    assert colours["layers.0.operator"] == nvtx_ranges.COLOURS["conv"]
    assert colours["layers.2.operator"] == nvtx_ranges.COLOURS["attn"]


def test_the_ranges_of_parts_lie_inside_that_of_their_whole(recorded: list[list[str]]) -> None:
    open_ranges: list[str] = []
    inside = set()
    for what, *words in recorded:
        if what == "push":
            inside.add((tuple(open_ranges), words[-1]))
            open_ranges.append(words[-1])
        elif what == "pop":
            open_ranges.pop()
    assert not open_ranges
    assert (("model", "layers.0"), "layers.0.operator") in inside


def named(recorded: list[list[str]], what: str) -> list[list[str]]:
    return [words for words in recorded if words[0] == what]


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nobody_who_does_not_ask_gets_ranges(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(nvtx_ranges.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(nvtx_ranges.VARIABLE, value)
    assert nvtx_ranges.lfm2kit_block_wrapper(*BLOCK) is None


@pytest.mark.parametrize(("value", "said"), [("1", "pip install nvtx"), ("yes", "write 1")])
def test_ranges_that_cannot_be_made_are_told_before_anything_runs(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvtx_ranges.VARIABLE, value)
    monkeypatch.setattr(nvtx_ranges, "find_spec", lambda name: None)
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"{nvtx_ranges.VARIABLE}={value}: .*{said}"):
        nvtx_ranges.lfm2kit_block_wrapper(*BLOCK)


class Domain:
    """A domain that remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def get_event_attributes(self, message: str, colour: int, category: str) -> str:
        return message

    def push_range(self, attributes: str) -> None:
        self.told.append(f"push {attributes}")

    def pop_range(self) -> None:
        self.told.append("pop")


def test_a_block_that_raises_ends_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    nvtx = pytest.importorskip("nvtx")
    domain = Domain()
    monkeypatch.setattr(nvtx, "get_domain", lambda name: domain)
    monkeypatch.setenv(nvtx_ranges.VARIABLE, "1")

    def block(*inputs: Any) -> None:
        raise ValueError("no")

    wrapper = nvtx_ranges.lfm2kit_block_wrapper(*BLOCK)
    assert wrapper is not None
    assert not wrapper.survives_capture
    with pytest.raises(ValueError, match="no"):
        wrapper.wrap(block)()
    assert domain.told == ["push layers.0.feed_forward", "pop"]
