"""No output takes the place of a file that is read, whichever way its path is spelt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lfm2kit
from lfm2kit.building.loading import EMBEDDED
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.samples import read_answers
from lfm2kit.outputs.targets import check_apart, identity
from tests.checkpoint.folders import ORACLE
from tests.checkpoint.typed import Cli

Spelling = Callable[[Path], Path]


def directly(path: Path) -> Path:
    return path


def through_a_link(path: Path) -> Path:
    link = path.parents[1] / "link.out"
    link.symlink_to(path)
    return link


def through_a_folders_link(path: Path) -> Path:
    link = path.parents[1] / "folder link"
    link.symlink_to(path.parent)
    return link / path.name


def by_a_hard_link(path: Path) -> Path:
    link = path.parents[1] / "hard.out"
    os.link(path, link)
    return link


def with_dots(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


def by_a_link_to_nothing(path: Path) -> Path:
    link = path.parents[1] / "link to nothing"
    link.symlink_to(path)
    return link


SPELLINGS = [directly, through_a_link, through_a_folders_link, by_a_hard_link, with_dots]
spelt = pytest.mark.parametrize("spelling", SPELLINGS)


@spelt
def test_one_file_is_one_file_however_it_is_spelt(spelling: Spelling, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"")
    other = spelling(path)
    assert identity(other) == identity(path)
    with pytest.raises(Lfm2kitError, match=r"--outputs .*is the inputs; give another name"):
        check_apart({"--outputs": other}, {"the inputs": [path]})


def test_files_that_are_not_there_are_told_apart_by_folder_and_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("folder/file")
    assert identity(tmp_path / "link" / "file") == identity(tmp_path / "folder" / "file")
    assert identity(tmp_path / "dangling") == identity(tmp_path / "folder" / "file")
    assert identity(tmp_path / "file") != identity(tmp_path / "folder" / "file")
    assert identity(tmp_path / "nowhere" / "file") != identity(tmp_path / "file")


def test_two_outputs_are_two_files_but_a_device_may_be_named_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    with pytest.raises(Lfm2kitError, match=r"--json .*is --outputs's as well"):
        check_apart({"--outputs": tmp_path / "new", "--json": tmp_path / "link"}, {})
    check_apart({"--outputs": Path("/dev/null"), "--json": Path("/dev/null")}, {})
    check_apart({"--outputs": None, "--json": None}, {})


def test_loaded_modules_and_kept_kernels_are_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Lfm2kitError, match="a loaded module"):
        check_apart({"--json": Path(lfm2kit.__file__)}, {})
    kernel = tmp_path / "lfm2kit" / "cpu_simd" / "kernel"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Lfm2kitError, match="a kept kernel"):
        check_apart({"--json": kernel}, {})


def test_a_folder_that_may_not_be_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the cache in another user's home: played, since root may read all."""

    def forbidden(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    checkpoint = open_checkpoint(EMBEDDED / "tiny")
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, forbidden)
    check_apart({"--json": tmp_path / "new"}, {"one of the model's": checkpoint.files()})


@pytest.mark.parametrize("descriptor", [1, 2])
def test_the_file_that_printed_lines_go_to_is_no_output(descriptor: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lfm2kit", "env", "--json", "log"]
    with open(tmp_path / "log", "w") as log:
        streams = {1: "stdout", 2: "stderr"}
        pipes = dict.fromkeys(streams.values(), subprocess.PIPE) | {streams[descriptor]: log}
        done = subprocess.run(words, cwd=tmp_path, text=True, timeout=120, **pipes)
    said = done.stderr or (tmp_path / "log").read_text()
    assert (done.returncode, said.count("\n")) == (2, 1), said
    assert "--json log: this file is where the printed lines go" in said


# ---- what a model is read from ----


def test_a_checkpoint_knows_every_file_that_it_is_read_from() -> None:
    """Those that Python opens meanwhile; inputs and answers are read apart from it."""
    opened: set[str] = set()

    def hook(event: str, arguments: tuple[object, ...]) -> None:  # stays until the process ends
        if event == "open" and is_watching:
            opened.add(str(arguments[0]))

    is_watching = True
    sys.addaudithook(hook)
    folders = [EMBEDDED / "tiny", ORACLE / "odd_sharded", ORACLE / "experts_stored_packed"]
    known = [str(path) for folder in folders for path in open_checkpoint(folder).files()]
    is_watching = False
    read = {path for path in opened if Path(path).parent in folders}
    assert len(read) >= 8  # a config and weights of each, an index and two more shards
    assert read <= set(known)


def test_weights_of_any_name_are_known(tmp_path: Path) -> None:
    """As in a hub's cache, whose files are links to blobs that are named by their hash."""
    folder = cached_model(tmp_path)
    known = {identity(path) for path in open_checkpoint(folder).files()}
    assert {identity(path) for path in (tmp_path / "blobs").iterdir()} <= known


def cached_model(tmp_path: Path) -> Path:
    """Return a model as the hub's client keeps it: names that are links to hashed contents."""
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for i, name in enumerate(["config.json", "model.safetensors"]):
        shutil.copy(EMBEDDED / "tiny" / name, tmp_path / "blobs" / f"{i:040x}")
        (folder / name).symlink_to(tmp_path / "blobs" / f"{i:040x}")
    return folder


# ---- on the command line ----


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder: a copy of the embedded model and all else that a run reads."""
    folder = Path(shutil.copytree(EMBEDDED / "tiny", tmp_path / "tiny"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "plan.toml").write_text('default = "reference"\n')
    shutil.move(folder / "inputs.bin", folder / "my inputs")
    shutil.copy(folder / "answers.bin", folder / "my answers")
    monkeypatch.chdir(folder)
    return folder


RUN = ["run", "-m", ".", "--plan", "plan.toml", "--inputs", "my inputs", "-n", "1"]
READ = [
    "model.safetensors", "config.json", "tokenizer.json", "my inputs", "plan.toml",
]  # fmt: skip


@pytest.mark.parametrize("option", ["--outputs", "--json"])
@pytest.mark.parametrize("name", READ)
@spelt
def test_no_result_of_a_run_takes_the_place_of_a_file_that_it_reads(
    tiny: Path, cli: Cli, option: str, name: str, spelling: Spelling
) -> None:
    before = (tiny / name).read_bytes()
    target = spelling(tiny / name)
    cli(*RUN, option, target).assert_fails(option, str(target), "give another name")
    assert (tiny / name).read_bytes() == before


@pytest.mark.parametrize("option", ["--outputs", "--json", "--record-load"])
@pytest.mark.parametrize("name", ["model.bin", "config.json", "x/model-1-of-2.safetensors"])
def test_no_result_becomes_a_file_that_looks_like_a_models(
    tiny: Path, cli: Cli, option: str, name: str
) -> None:
    target = tiny / "other" / name
    target.parent.mkdir(parents=True)
    for one in (target, by_a_link_to_nothing(target)):
        cli(*RUN, option, one).assert_fails(f"{option} {one}", "a checkpoint's file is called so")
    assert not target.exists()


@pytest.mark.parametrize("option", ["--outputs", "--json", "--record-load"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_no_result_takes_the_place_of_tensors_whatever_they_are_called(
    tiny: Path, cli: Cli, option: str, name: str, tmp_path: Path
) -> None:
    assert cli("convert", ".", tmp_path / "model.bin").code == 0
    shutil.copy(tiny / "model.safetensors", tmp_path)
    weights = (tmp_path / name).rename(tmp_path / "weights")
    before = weights.read_bytes()
    cli(*RUN, option, weights).assert_fails(f"{option} {weights}", "contains tensors")
    assert weights.read_bytes() == before


@pytest.mark.parametrize("command", ["plan", "warmup"])
@pytest.mark.parametrize("name", ["model.safetensors", "plan.toml"])
@pytest.mark.parametrize("spelling", [through_a_link, by_a_hard_link])
def test_no_document_of_another_command_does(
    tiny: Path, cli: Cli, command: str, name: str, spelling: Spelling
) -> None:
    target = spelling(tiny / name)
    said = cli(command, "-m", ".", "--plan", "plan.toml", "--json", target)
    said.assert_fails("--json", str(target))


def test_the_answers_may_be_replaced_by_outputs_but_not_by_a_report(tiny: Path, cli: Cli) -> None:
    """A report named by its default place, where the run reads them only with -v, as well."""
    run = [*RUN, "-v", "--answers", "my answers"]
    cli(*run, "--json", "my answers").assert_fails("--json", "the answers")
    cli(*RUN, "--json", "answers.bin").assert_fails("--json", "the answers")
    vocab_size = read_answers(tiny / "my answers").shape[1]
    assert cli(*run, "--outputs", "my answers").code == 0
    assert read_answers(tiny / "my answers").shape == (1, vocab_size)


def test_outputs_that_replace_more_samples_than_they_are_say_so(tiny: Path, cli: Cli) -> None:
    """What was there may be answers to all samples; the same number again is not worth a word."""
    held = len(read_answers(tiny / "my answers"))
    said = [cli(*RUN, "--outputs", "my answers").err for _ in range(2)]
    assert f"my answers held {held} samples before, and now holds 1" in said[0]
    assert said[1] == ""
    assert cli(*RUN[:-1], "2", "--outputs", "my answers").err == ""
    assert cli(*RUN, "--outputs", "/dev/null").err == ""


def test_a_blob_behind_the_weights_is_no_output(tmp_path: Path, cli: Cli) -> None:
    folder = cached_model(tmp_path)
    blob = tmp_path / "blobs" / f"{1:040x}"
    run = ["run", "-m", folder, "-b", "reference", "-n", "1", "--random-inputs", "4"]
    cli(*run, "--outputs", blob).assert_fails("--outputs", "one of the model's")
