"""Corrupted copies of the embedded model on the command line: one line, exit code 2, no file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lfm2kit.building.loading import EMBEDDED
from lfm2kit.checkpoint.names import INDEX, SINGLE
from lfm2kit.checkpoint.safetensors import read_safetensors
from tests.checkpoint.folders import change_json, change_tensors, ones
from tests.checkpoint.typed import Cli

NORM = "model.embedding_norm.weight"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the embedded model, in a current folder with nothing else."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(EMBEDDED / "tiny", tmp_path / "copy"))


def header(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the text of the header; its length stays true."""
    file = (folder / SINGLE).read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    text = change(file[8:end])
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + file[end:])


def entry(folder: Path, **changes: object) -> None:
    """Change what the header says of the last norm."""

    def change(text: bytes) -> bytes:
        fields = json.loads(text)
        fields[NORM] |= changes
        return json.dumps(fields).encode()

    header(folder, change)


def cut_in_half(folder: Path) -> None:
    file = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(file[: len(file) // 2])


def emptied(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"")


def zeroed(folder: Path) -> None:
    (folder / SINGLE).write_bytes(bytes((folder / SINGLE).stat().st_size))


def a_web_page(folder: Path) -> None:
    (folder / SINGLE).write_text("<!DOCTYPE html>\n<html>404: not found</html>\n")


def a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")


def huge_header(folder: Path) -> None:
    file = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes((2**62).to_bytes(8, "little") + file[8:])


def no_json(folder: Path) -> None:
    header(folder, lambda text: text[:-40])


def twice(folder: Path) -> None:
    again = f'"{NORM}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}},'.encode()
    header(folder, lambda text: b"{" + again + text[1:])


def overlapping(folder: Path) -> None:
    fields = json.loads((folder / SINGLE).read_bytes()[8:].split(b"}}")[0] + b"}}")
    begin, end = fields[NORM]["data_offsets"]
    entry(folder, data_offsets=[begin - 4, end - 4])


def beyond_the_file(folder: Path) -> None:
    entry(folder, data_offsets=[10**15, 10**15 + 256], shape=[128])


def of_float64(folder: Path) -> None:
    entry(folder, dtype="F64")


def missing(folder: Path) -> None:
    change_tensors(folder, lambda tensors: [tensors.pop(NORM)].clear())


def misshapen(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({NORM: ones(1)}))


def left_over(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.mtp.weight": ones(1)}))


def of_markup(folder: Path) -> None:
    name = "model.[/red]\\[/x] :warning:\n\x1b[2Jlfm2kit: error: \ud800"
    change_tensors(folder, lambda tensors: tensors.update({name: ones(1)}))


def another_head(folder: Path) -> None:
    embedding = read_safetensors(folder / SINGLE)["model.embed_tokens.weight"]
    head = replace(embedding, data=np.zeros_like(embedding.data))
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def a_config_cut_in_half(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def a_config_without_theta(folder: Path) -> None:
    change_json(folder / "config.json", rope_theta=None, rope_parameters=None)


def a_config_of_a_billion_experts(folder: Path) -> None:
    change_json(folder / "config.json", num_experts=10**9)


def an_index_out_of_the_folder(folder: Path) -> None:
    weight_map = dict.fromkeys(read_safetensors(folder / SINGLE), f"../{SINGLE}")
    (folder / SINGLE).rename(folder.parent / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def no_tensors(folder: Path) -> None:
    (folder / SINGLE).unlink()


CORRUPTIONS: dict[Callable[[Path], None], list[str]] = {
    cut_in_half: [SINGLE, "tensor '", "truncated"],
    emptied: [SINGLE, "empty"],
    zeroed: [SINGLE, "JSON"],
    a_web_page: [SINGLE, "web page", "download"],
    a_pointer_of_git_lfs: [SINGLE, "Git LFS pointer", "git lfs pull"],
    huge_header: [SINGLE, "header claims"],
    no_json: [SINGLE, "JSON"],
    twice: [SINGLE, f"'{NORM}' twice"],
    overlapping: [SINGLE, f"'{NORM}'", "overlaps"],
    beyond_the_file: [SINGLE, f"'{NORM}'", "truncated"],
    of_float64: [SINGLE, f"'{NORM}'", "'F64'"],
    missing: ["copy", "no tensor 'embedding_norm.weight'"],
    misshapen: ["copy", "'embedding_norm.weight'", "[1]"],
    left_over: ["copy", "no place", "mtp.weight"],
    of_markup: ["copy", "no place", "[/red]\\[/x] :warning:\\n\\x1b[2J", "\\ud800"],
    another_head: ["copy", "lm_head.weight", "tied"],
    without_config: ["copy", "config.json"],
    a_config_cut_in_half: ["config.json", "JSON"],
    a_config_without_theta: ["config.json", "rope_theta"],
    a_config_of_a_billion_experts: ["config.json", "num_experts", "1000000000"],
    an_index_out_of_the_folder: [INDEX, f"../{SINGLE}", "not the plain name of a file"],
    no_tensors: ["copy", SINGLE],
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_a_corrupted_model_is_one_line_and_writes_nothing(
    tiny: Path, cli: Cli, corrupt: Callable[[Path], None]
) -> None:
    corrupt(tiny)
    before = sorted(tiny.parent.rglob("*"))
    run = ["run", "--model", "copy", "--backend", "reference", "-n", 1]
    typed = cli(*run, "-v", "--outputs", "outputs.bin", "--json", "run.json")
    typed.assert_fails(*CORRUPTIONS[corrupt])
    assert sorted(tiny.parent.rglob("*")) == before


@pytest.mark.parametrize("command", [["plan"], ["convert"], ["bench", "-n", "1", "-r", "1"]])
def test_other_commands_say_the_same(tiny: Path, cli: Cli, command: list[str]) -> None:
    cut_in_half(tiny)
    arguments = ["copy", "target"] if command == ["convert"] else ["--model", "copy"]
    cli(*command, *arguments).assert_fails(SINGLE, "truncated")
    assert list(tiny.parent.iterdir()) == [tiny]


def test_the_console_script_says_the_same(tiny: Path) -> None:
    of_markup(tiny)
    command = [sys.executable, "-m", "lfm2kit", "run", "--model", "copy", "--outputs", "out.bin"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.parent)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("lfm2kit: error: copy: ")
    assert list(tiny.parent.iterdir()) == [tiny]


def test_an_untouched_copy_runs(tiny: Path, cli: Cli) -> None:
    done = cli("run", "-v", "--model", "copy", "--backend", "reference", "-n", 1)
    assert (done.code, "VALID" in done.out.splitlines()) == (0, True)
