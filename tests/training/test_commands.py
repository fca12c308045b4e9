"""How the commands of `training` take numbers, and how they end."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import pytest

from lfm2kit.errors import Lfm2kitError
from training.commands import PACKAGES, ended, whole


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert [whole(text) for text in ("0", "512", "41e6")] == [0, 512, 41_000_000]
    assert whole("9007199254740993") == 2**53 + 1


@pytest.mark.parametrize("text", ["inf", "nan", "-1", "1.5", "", "many", "1e999"])
def test_what_is_no_whole_number_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number, such as 512"):
        whole(text)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Lfm2kitError("no data; make some"), 2, "error: no data; make some"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_a_command_ends_with_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_, ended():
        raise error
    assert exit_.value.code == code
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("command", ["prepare", "train", "check"])
def test_a_package_that_is_not_installed_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    monkeypatch.delitem(sys.modules, f"training.{command}", raising=False)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(f"training.{command}", run_name="__main__")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no ")
    assert "pip install tokenizers torch transformers" in line


def test_a_package_that_is_imported_later_is_one_line_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_, ended():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    assert exit_.value.code == 2
    assert "there is no torch" in capsys.readouterr().err


def test_a_module_that_should_be_there_is_no_fault_of_the_users() -> None:
    with pytest.raises(ModuleNotFoundError), ended():
        raise ModuleNotFoundError("No module named 'training.gone'", name="training.gone")


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_, ended():
        (tmp_path / "file" / "folder").mkdir(parents=True)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Not a directory" in line
    assert str(tmp_path) in line
