"""Jobs whose ranks differ in one thing end at once, all of them, in one line that names it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import lfm2kit
from lfm2kit.building.loading import find_model
from tests.mpi.test_rank_command import CONSOLE_SCRIPT

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec, flags_for, version_of

pytestmark = pytest.mark.mpi
RUN = [CONSOLE_SCRIPT, "run", "-n", "4", "--backend", "reference"]
A_WHILE = 60  # seconds: ranks that wait for each other take longer


def job(*ranks: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a job with a command line for each rank, as a user's own mpiexec starts it."""
    command = [find_mpiexec(), *flags_for(version_of(find_mpiexec()), 2)]
    for words in ranks:
        command += ["-n", "1", *words, ":"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        command[:-1], capture_output=True, text=True, timeout=A_WHILE, env=environment
    )


def on_path(folder: Path) -> str:
    """Return the setting with which a rank looks for modules in `folder` first."""
    before = os.environ.get("PYTHONPATH")
    return "PYTHONPATH=" + os.pathsep.join(filter(None, [str(folder), before]))


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("lfm2kit: ")]
    assert (done.returncode, done.stdout, len(errors)) == (2, "", 1), done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in errors[0] for word in words), errors


@pytest.fixture
def odd_plugin(tmp_path: Path) -> str:
    """Put a plugin that cannot be imported on the PYTHONPATH of one rank."""
    (tmp_path / "odd_plugin.py").write_text("import a_module_that_is_not_there\n")
    info = tmp_path / "odd_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lfm2kit]\nodd = odd_plugin\n")
    return on_path(tmp_path)


def test_an_option_that_one_rank_has_alone_ends_all() -> None:
    done = job(RUN, [*RUN, "--trim"], RUN)
    assert_refused(done, "--trim is not given on ranks 0, 2 and given on rank 1")


def test_what_keeps_some_ranks_from_running_ends_all() -> None:
    wrong = (["--no-such-option"], ["--transport", "pigeon"], ["--model", "nowhere"])
    done = job(RUN, *([*RUN, *arguments] for arguments in wrong))
    assert_refused(
        done,
        "rank 1: No such option: --no-such-option",
        "rank 2: unknown transport 'pigeon'",
        "rank 3: no model 'nowhere'",
    )


def test_options_that_do_not_go_together_on_one_rank_end_all() -> None:
    done = job(RUN, [*RUN, "--parallel", "dp", "--ep-size", "2"])
    assert_refused(done, "rank 1: --parallel dp and --ep-size 2: give only one of them")


def test_another_model_on_one_rank_ends_all(tmp_path: Path) -> None:
    copy = shutil.copytree(find_model("tiny"), tmp_path / "tiny")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    done = job([*RUN, "--model", str(copy)], RUN)
    assert_refused(done, "the content of", str(copy), "on rank 0")


def test_a_plugin_that_is_broken_on_one_rank_ends_all(odd_plugin: str) -> None:
    done = job(RUN, ["env", odd_plugin, *RUN])
    assert_refused(done, "plugin odd is missing on rank 0 and broken", "a_module_that_is")


@pytest.mark.long
def test_another_list_of_plugins_on_one_rank_ends_all() -> None:
    done = job(RUN, ["env", "LFM2KIT_PLUGINS=reference", *RUN])
    assert_refused(done, "LFM2KIT_PLUGINS is missing on rank 0 and reference on rank 1")


@pytest.mark.long
def test_another_lfm2kit_on_one_rank_ends_all(tmp_path: Path) -> None:
    package = Path(lfm2kit.__file__).parent
    shutil.copytree(package, tmp_path / "lfm2kit", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "lfm2kit" / "errors.py").open("a") as file:
        file.write("# another\n")
    done = job(RUN, ["env", on_path(tmp_path), *RUN])
    assert_refused(done, "lfm2kit is lfm2kit", str(tmp_path / "lfm2kit"), "on rank 1")


def test_what_is_wrong_everywhere_is_said_once_and_of_no_rank() -> None:
    done = job([*RUN, "-n", "100000"], [*RUN, "-n", "100000"])
    assert_refused(done, "error: -n 100000: the inputs hold")
