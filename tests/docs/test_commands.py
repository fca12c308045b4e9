"""Every command of lfm2kit on the pages can be typed, and what this machine can run is run.

Each page's commands run in their order, in a folder that has what the page's reader has.  Names
of large models are small ones there, and repetitions are few.  Commands that need a GPU or several
machines are only read, options and values.  docs/plugins.md, which begins with installing, is run
by tests/plugins/test_docs.py.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from lfm2kit_int8.__main__ import quantise

from lfm2kit.building.loading import EMBEDDED
from lfm2kit.cli import app
from lfm2kit.measuring import block_times, calibration, exchange_times, together
from tests.checkpoint.typed import Cli, Typed
from tests.docs.pages import ROOT, Command, commands, pages
from tests.random_model import CONFIG

# What a page calls a model, and what runs here in its place.
WITH_TEXT = ("FOLDER", "MODEL", "LFM2-8B-A1B", "LFM2-8B-A1B-Q4_K_M.gguf")
WITHOUT_TEXT = ("8b", "wide-6", "wide-6-BF16")
# Typed behind a command to make it short: of an option that is given twice, the last counts.
SHORTER = {
    "bench": ("-n", "1", "-r", "2"),
    "chat": ("--max-tokens", "8"),
    "generate": ("--max-tokens", "8"),
    "run": ("-n", "4", "--threads", "1"),
}
STDIN = {"chat": "Who are you?\n/exit\n", "prompt.txt": "It is", "question.txt": "Who?"}
# A backend of the reader's that judges itself: one that builds all blocks, and one that builds few.
MINE = {"check": "reference", "matrix": "blas", "verify": "cpu_simd"}
TOO_LARGE = re.compile(
    r"\b(cuda|hybrid|nccl|torch)\b|lfm2kit (grade|convert lfm2-8b-a1b)|training/"
)
MEASURES_LONG = re.compile(r"lfm2kit profile|backends matrix|(experts|layer|MLP)\(")
INSTALLED = ("docs/plugins.md", "docs/tutorial.md")

ALL = {page: found for page in pages() if (found := commands(page))}


def elsewhere(command: Command) -> bool:
    """Return whether a test in tests/plugins runs a command, with the package of the reader."""
    is_suite = command.words[1:] == ("check", "mine")
    return command.page in INSTALLED or is_suite or "mlp=mine" in str(command)


def is_too_large(command: Command) -> bool:
    """Return whether a command needs a GPU, PyTorch, several machines, or much time or space."""
    if "--simulate" in command.words:
        return not {"rates.json", "two.json"}.isdisjoint(command.words)  # measured by ranks
    is_started = re.search("mpirun|network|NODES", command.before)
    return bool(is_started or TOO_LARGE.search(str(command)))


def is_long(command: Command) -> bool:
    """Return whether a command starts ranks, or takes long; shorter tests of each are elsewhere."""
    is_job = command.name != "plan" and "--ranks" in command.words
    return is_job or MEASURES_LONG.search(str(command)) is not None


def makes_what_others_read(command: Command) -> bool:
    return "--record-load" in command.words


def is_run(command: Command) -> bool:
    return not elsewhere(command) and not is_too_large(command)


def here(found: list[Command], known: set[str]) -> list[Command]:
    """Return the commands that run in this process, jobs that write a file as one rank.

    What is `known` from another page, and has to do with no file, is not run again.
    """
    mine = [c for c in found if is_run(c) and (not is_long(c) or makes_what_others_read(c))]
    new = [c for c in mine if c.typed not in known or re.search(r"\.\w", c.typed)]
    known.update(c.typed for c in mine)
    return new


KNOWN: set[str] = set()
HERE = {page: ours for page, found in ALL.items() if (ours := here(found, KNOWN))}
LONG = [c for found in ALL.values() for c in found if is_run(c) and is_long(c)]


@pytest.fixture(scope="module")
def grammar() -> Any:
    """Return the command line, whose commands do nothing but read what was typed."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="lfm2kit")
    idle([group.get_command(context, name) for name in group.list_commands(context)])
    return group


def idle(found: list[Any]) -> None:
    for command in found:
        command.callback = lambda **values: None
        idle(list(getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", ALL)
def test_the_commands_of_a_page_can_be_typed(page: str, grammar: Any) -> None:
    for command in ALL[page]:
        if page not in INSTALLED or command.name not in ("runs", "sums"):  # which that page makes
            grammar.main(list(command.words), "lfm2kit", standalone_mode=False)


def test_a_wrong_option_on_a_page_would_be_found(grammar: Any) -> None:
    with pytest.raises(Exception, match="No such option: --modle"):
        grammar.main(["run", "--modle", "tiny"], "lfm2kit", standalone_mode=False)


@pytest.fixture
def folder(tmp_path: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that commands run in, with the files that pages suppose."""
    monkeypatch.chdir(tmp_path)
    for names, model in ((WITH_TEXT, EMBEDDED / "tiny"), (WITHOUT_TEXT, random_folder)):
        for name in names:
            (tmp_path / name).symlink_to(model)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "It is"}\n')
    (tmp_path / "book.txt").write_text("It is a truth universally acknowledged.\n")
    return tmp_path


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a calibration be short."""
    monkeypatch.setattr(together, "REPETITIONS", 1)
    monkeypatch.setattr(calibration, "ROWS", (1, 4))
    monkeypatch.setattr(block_times, "ROWS", (1, 4))
    monkeypatch.setattr(exchange_times, "COPY_BYTES", 1)


def words(command: Command) -> list[str]:
    """Return what is typed here: as on the page, but for names, and numbers that take time."""
    ours = next((ours for name, ours in MINE.items() if name in command.words), "mine")
    typed = [word.replace("~/", "").replace("32768", "64") for word in command.words]
    named = [ours if word == "mine" else word for word in typed]
    enough = ("-r", "5") if "--json" in typed and command.name == "bench" else ()  # for the noise
    return [*named, *SHORTER.get(command.name, ()), *enough]


def alone(typed: list[str]) -> list[str]:
    """Return a command of a job as one of a process."""
    if typed[0] == "plan" or "--ranks" not in typed:
        return typed
    at = typed.index("--ranks")
    return typed[:at] + typed[at + 2 :]


def prepare(page: str, folder: Path, cli: Cli) -> None:
    """Make what a page's reader has made by other programs than lfm2kit."""
    match page:
        case "docs/performance-ranks.md":
            (folder / "config.json").write_text(json.dumps(CONFIG))
            (folder / "model.toml").write_text(cli("specs", "MODEL").out)
        case "docs/testing.md":
            cli("verify", "--model", "MODEL", "-b", "reference", "--write-trace", "one.npz")
        case "plugins/lfm2kit-int8/README.md":
            quantise(folder / "MODEL", folder / "NEW_FOLDER")
            (folder / "wide.toml").write_text(cli("specs", "MODEL").out)


@pytest.mark.parametrize("page", HERE)
def test_the_commands_of_a_page_run(
    page: str, folder: Path, quickly: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(page, folder, cli)
    for command in HERE[page]:
        make_folders(command, folder)
        text = STDIN.get(command.stdin or command.name, "<|im_start|>user")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        done = started(command) if "=" in command.before else cli(*alone(words(command)))
        might_be_slower = "--fail-on-slower" in command.words  # which exit code 1 says
        assert done.code in (0, int(might_be_slower)), (str(command), done.err)
        if command.stdout is not None:
            (folder / command.stdout).write_text(done.out)


def make_folders(command: Command, folder: Path) -> None:
    """Make the folders that the page makes, as a reader does whose folder is empty."""
    for made in command.folders:
        (folder / made).mkdir()


def started(command: Command) -> Typed:
    """Run a command as a process of its own, whose plugins see its variables."""
    variables = dict(re.findall(r"(\w+)=(\S+)", command.before))
    program = [sys.executable, "-m", "lfm2kit", *words(command)]
    done = subprocess.run(program, env=os.environ | variables, capture_output=True, text=True)
    return Typed(done.returncode, done.stdout, done.stderr)


@pytest.mark.long
@pytest.mark.mpi
@pytest.mark.parametrize("command", LONG, ids=str)
def test_a_command_that_takes_long_runs(command: Command, folder: Path, cli: Cli) -> None:
    if "m.bin" in command.words:  # beside its config.json no other file may describe a model
        cli("convert", "wide-6", "m.bin")
    else:
        (folder / "model.toml").write_text(cli("specs", "MODEL").out)
    cli("run", "-m", "model.toml" if "model.toml" in command.words else "tiny",
        "--random-inputs", "8", "-n", "2", "--record-load", "load.json")  # fmt: skip
    done = started(command)
    assert done.code == 0, done.err
