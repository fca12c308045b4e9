"""`lfm2kit backends new` and `lfm2kit transports new`: what they write, and when they do not."""

from __future__ import annotations

import ast
import errno
import os
import re
import tomllib
from pathlib import Path

import pytest

import lfm2kit
from tests.checkpoint.typed import Cli

KINDS = ("backend", "transport")


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go into an empty folder, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict[str, str]:
    """Return the texts of all files of a folder, by their paths in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_rendered_with_the_name(cli: Cli, empty: Path, kind: str) -> None:
    assert cli(f"{kind}s", "new", "my-own").code == 0
    assert list(empty.iterdir()) == [empty / "lfm2kit-my-own"]
    files = written(empty / "lfm2kit-my-own")
    assert {
        ".gitignore", ".github/workflows/checks.yml", "README.md", "pyproject.toml",
        "lfm2kit_my_own/__init__.py", "lfm2kit_my_own/py.typed", f"tests/test_{kind}.py",
    } <= set(files)  # fmt: skip
    for path, text in files.items():
        assert not re.search(r"\$(?!\{\{ )", text), path
        if path.endswith(".py"):
            ast.parse(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["name"] == "lfm2kit-my-own"
    assert project["entry-points"]["lfm2kit"] == {"my-own": "lfm2kit_my_own"}
    assert f'"lfm2kit[testing]=={lfm2kit.__version__}"' in files[".github/workflows/checks.yml"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_to_type_next_and_the_readme_and_ci_say_the_same(
    cli: Cli, empty: Path, kind: str
) -> None:
    done = cli(f"{kind}s", "new", "mine", "--into", "a folder")
    typed = re.findall(r"^    (.*)$", done.out, re.MULTILINE)
    assert typed[:3] == ["cd 'a folder'", "pip install -e '.[test]'", f"lfm2kit {kind}s check mine"]
    files = written(empty / "a folder")
    assert re.findall(r"^    (.*)$", files["README.md"], re.MULTILINE) == typed[1:]
    assert f"- run: {typed[3]}\n" in files[".github/workflows/checks.yml"]
    assert "LICENSE" in done.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "begins with a letter"),
        ("9mine", "begins with a letter"),
        ("my backend", "has letters, digits, - and _"),
        ("../mine", "has letters, digits, - and _"),
        ("mine\n", "'mine\\n'"),
        ("mine-", "ends with a letter or a digit"),
        ("auto", "is reserved"),
        ("reference", "the plugin 'reference' of lfm2kit"),
        ("blas", "the plugin 'blas' of lfm2kit-blas"),
        ("cpu-simd", "the package lfm2kit-cpu-simd"),
        ("n" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_cannot_be_had_is_one_line_and_nothing_is_written(
    cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, says: str
) -> None:
    monkeypatch.setenv("LFM2KIT_PLUGINS", "reference")  # hides no name
    cli(f"{kind}s", "new", name).assert_fails(says)
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("there", ["folder", "file", "link to nothing"])
def test_what_is_there_already_stays(cli: Cli, empty: Path, there: str) -> None:
    path = empty / "lfm2kit-mine"
    if there == "folder":
        path.mkdir()
    elif there == "file":
        path.touch()
    else:
        path.symlink_to("nothing")
    cli("backends", "new", "mine").assert_fails("lfm2kit-mine is there already", "another folder")
    assert os.listdir(empty) == ["lfm2kit-mine"]
    assert not path.is_dir() or os.listdir(path) == []


def test_a_folder_in_none_is_one_line(cli: Cli, empty: Path) -> None:
    cli("backends", "new", "mine", "--into", "no/mine").assert_fails("the folder no is not there")
    assert os.listdir(empty) == []


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "No space left"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failure_half_way_leaves_nothing(
    cli: Cli, empty: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    write, count = Path.write_text, 0

    def fails(path: Path, text: str, encoding: str) -> int:
        nonlocal count
        if (count := count + 1) == 4:
            assert os.listdir(empty)  # a part of the package
            raise error
        return write(path, text, encoding=encoding)

    monkeypatch.setattr(Path, "write_text", fails)
    assert cli("backends", "new", "mine").code == code
    assert os.listdir(empty) == []
