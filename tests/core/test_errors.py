"""Sentences name options by their fields; users of Python and of the command line see their own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lfm2kit
from lfm2kit.cli.flags import flag, told
from lfm2kit.errors import Lfm2kitError, Option, either

CORE = Path(lfm2kit.__file__).parent
ROOT = Path(__file__).parents[2]
# What speaks of its own flags: the command line, pytest's plugin, and a watch over processes.
SPEAK_OF_FLAGS = {"__main__.py", "pytest_options.py", "test_backend.py", "faults.py"}


@pytest.mark.parametrize(
    ("option", "in_python", "as_flag"),
    [
        (Option("threads", 8), "threads=8", "--threads 8"),
        (Option("n_cpu_moe"), "n_cpu_moe", "--n-cpu-moe"),
        (Option("n", 3), "n=3", "-n 3"),
        (Option("overwrite", True), "overwrite=True", "--overwrite"),
        (Option("backend", "a,mlp=b"), "backend='a,mlp=b'", "--backend a,mlp=b"),
        (Option("plan", Path("my plan")), "plan='my plan'", "--plan 'my plan'"),
    ],
)
def test_an_option_is_a_keyword_in_python_and_a_flag_on_the_command_line(
    option: Option, in_python: str, as_flag: str
) -> None:
    error = Lfm2kitError("try ", option, ".")
    assert str(error) == f"try {in_python}."
    assert told(error) == f"try {as_flag}."


def test_an_option_from_the_environment_is_shown_as_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LFM2KIT_BACKEND", "cuda")
    assert flag(Option("backend", "cuda")) == "LFM2KIT_BACKEND=cuda"
    assert flag(Option("backend", "reference")) == "--backend reference"
    monkeypatch.delenv("LFM2KIT_BACKEND")
    assert flag(Option("backend")) == "--backend"


def test_braces_and_percent_signs_in_a_sentence_are_only_text() -> None:
    error = Lfm2kitError("{threads} %s: ", Option("threads", 1))
    assert (str(error), told(error)) == ("{threads} %s: threads=1", "{threads} %s: --threads 1")


def test_several_options_are_offered_in_one_sentence() -> None:
    offered = either([Option("precision", "bf16"), Option("n_cpu_moe", 3)])
    assert told(Lfm2kitError("try ", *offered)) == "try --precision bf16 or --n-cpu-moe 3"
    assert either([]) == []


def messages(path: Path) -> Iterator[str]:
    """Yield every text in a module but its docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            is_text = isinstance(child, ast.Constant) and isinstance(child.value, str)
            if is_text and not isinstance(node, ast.Expr):
                yield child.value


def library() -> Iterator[Path]:
    for folder in (CORE, ROOT / "backends"):
        for path in folder.rglob("*.py"):
            if CORE / "cli" not in path.parents and path.name not in SPEAK_OF_FLAGS:
                yield path


def test_no_message_of_the_library_names_a_flag_of_the_command_line() -> None:
    flags = re.compile("|".join(rf"{flag(Option(name))}\b" for name in option_names()))
    for path in library():
        said = [text for text in messages(path) if flags.search(text)]
        assert not said, (path, said)


@cache
def option_names() -> set[str]:
    """Return the names of all options of the command line that have more than a letter."""
    import typer

    from lfm2kit.cli import app

    def names(command: typer.core.TyperCommand | typer.core.TyperGroup) -> Iterator[str]:
        yield from (o for p in command.params for o in p.opts if o.startswith("--"))
        for inner in getattr(command, "commands", {}).values():
            yield from names(inner)

    group: Any = typer.main.get_command(app)
    group.build_own()
    found = {name.removeprefix("--").replace("-", "_") for name in names(group)}
    return found - {"help", "version"}


def test_every_option_that_a_message_names_is_one() -> None:
    for path in library():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Option":
                name = node.args[0]
                assert not isinstance(name, ast.Constant) or name.value in option_names(), path


def test_no_message_of_the_core_names_a_backend_or_a_transport() -> None:
    """Launchers of other software have options that are called so."""
    names = re.compile(r"\b(cpu_simd|cuda|hybrid|mpi)\b")
    for path in library():
        if CORE in path.parents and path.name != "launchers.py":
            said = [text for text in messages(path) if names.search(text)]
            assert not said, (path, said)
