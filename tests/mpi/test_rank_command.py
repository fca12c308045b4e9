"""Ranks run the code that the user started: nothing from the current folder, nor another clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lfm2kit
from lfm2kit.transport import rank_command

CONSOLE_SCRIPT = str(Path(sys.executable).parent / "lfm2kit")
MODULE = [sys.executable, "-m", "lfm2kit"]
JOB = ["run", "--ranks", "2", "-n", "2", "--backend", "reference"]
A_WHILE = 120


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=A_WHILE
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with another lfm2kit, which says "Clone:" instead of "Model:"."""
    package = Path(lfm2kit.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tmp_path / "lfm2kit", ignore=ignored)
    source = tmp_path / "lfm2kit" / "cli" / "performing.py"
    source.write_text(source.read_text().replace('f"Model: ', 'f"Clone: '))
    return tmp_path


@pytest.mark.long
@pytest.mark.mpi
def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    for name in ("random", "tomllib", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = run([CONSOLE_SCRIPT, *JOB, "-v"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "VALID" in done.stdout.splitlines()


@pytest.mark.long
@pytest.mark.mpi
def test_in_another_clone_the_ranks_run_the_code_of_the_script_that_was_started(
    clone: Path,
) -> None:
    done = run([CONSOLE_SCRIPT, *JOB], clone)
    assert done.stdout.startswith("Model: "), done.stderr


@pytest.mark.mpi
def test_the_ranks_of_a_module_run_the_folder_that_it_was_started_from(clone: Path) -> None:
    done = run([*MODULE, *JOB], clone)
    assert done.stdout.startswith("Clone: "), done.stderr


def test_a_rank_has_the_path_and_the_flags_of_the_process_that_starts_it(tmp_path: Path) -> None:
    ask = "sys.path.insert(0, 'here'); print(json.dumps(rank_command(['a b', ':x'])))"
    code = f"import json, sys; from lfm2kit.transport import rank_command; {ask}"
    command = json.loads(run([sys.executable, "-Os", "-c", code], tmp_path).stdout)
    place = command.index("-c") + 1
    shown = "[sys.argv[1:], [sys.flags.optimize, sys.flags.no_user_site], sys.path]"
    prologue = command[place].partition("from lfm2kit")[0]
    command[place] = f"{prologue}import json; print(json.dumps({shown}))"
    words, flags, path = json.loads(run(command, Path("/")).stdout)
    assert (words, flags) == (["a b", ":x"], [1, 1])
    assert path[:2] == [str(tmp_path / "here"), str(tmp_path)]


def test_a_command_is_ascii_whatever_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/tmp/ä\udcff'\n"])
    assert all(word.isascii() and word.isprintable() for word in rank_command(["run"]))
