"""What a command line may say, what it may not touch, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lfm2kit.__main__ import main
from lfm2kit.building.loading import EMBEDDED
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.convert import source_of, write_checkpoint
from tests.checkpoint.typed import Cli

LFM2KIT = [sys.executable, "-m", "lfm2kit"]
RUN = ["run", "-b", "reference", "-n", "1"]


def lfm2kit(
    *words: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LFM2KIT, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.fixture
def here(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run commands in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return cli


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu"], ["'rnu'", "Did you mean 'run'?", "see lfm2kit --help"]),
        (["run", "-n", "0"], ["-n 0: expected a whole number of 1 or more, such as -n 1"]),
        (["run", "--nosuch"], ["--nosuch", "see lfm2kit run --help"]),
        (["bench", "--block", "nosuch"], ["nosuch", "conv", "see lfm2kit bench --help"]),
        (["run", "--answers", "nosuch"], ["--answers nosuch", "-v"]),
        (["run", "--backend", ""], ["''"]),
        (["run", "-v", "--random-inputs", "4"], ["-v", "random inputs"]),
        (["run", "--inputs", "x", "--random-inputs", "4"], ["--inputs", "--random-inputs"]),
        (["convert", "tiny", "there", "--seed", "5"], ["--seed 5", "--random"]),
        (["run", "--seed", "5"], ["--seed 5", "--random-inputs"]),
    ],
)
def test_wrong_words_are_one_line_that_names_them(
    words: list[str], expected: list[str], here: Cli, tmp_path: Path
) -> None:
    here(*words).assert_fails(*expected)
    assert not list(tmp_path.iterdir())


def test_a_model_without_inputs_says_how_to_give_some(here: Cli) -> None:
    write_checkpoint(source_of(open_checkpoint(EMBEDDED / "tiny")), Path("model"))
    refused = here(*RUN, "-m", "model")
    refused.assert_fails("inputs.bin", "--inputs FILE", "--random-inputs 16")
    done = here(*RUN, "-m", "model", "--random-inputs", 5)
    assert (done.code, "1 of 5 tokens" in done.out) == (0, True), done.err


def test_an_embedded_model_is_not_hidden_by_a_folder_of_its_name(here: Cli) -> None:
    Path("tiny").mkdir()
    assert here(*RUN).code == 0
    here(*RUN, "-m", "./tiny").assert_fails("tiny")


@pytest.mark.parametrize("option", ["--outputs", "--json"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "inputs.bin"])
def test_no_result_takes_the_place_of_a_checkpoints_file(option: str, name: str, here: Cli) -> None:
    source = EMBEDDED / "tiny" / name
    Path(name).write_bytes(source.read_bytes())
    here(*RUN, option, name).assert_fails(option, name)
    assert Path(name).read_bytes() == source.read_bytes()


def test_outputs_and_json_are_two_files(here: Cli) -> None:
    here(*RUN, "--outputs", "x", "--json", "./x").assert_fails("--json")


@pytest.mark.parametrize("option", ["--outputs", "--json"])
def test_a_device_stays_one_and_a_link_too(option: str, cli: Cli, tmp_path: Path) -> None:
    device, link = tmp_path / "device", tmp_path / "link"
    device.symlink_to("/dev/null")
    link.symlink_to("real")
    for target in (device, link):
        assert cli(*RUN, option, target).code == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert link.is_symlink()
    assert (tmp_path / "real").stat().st_size > 0


def test_a_full_device_is_one_line(cli: Cli) -> None:
    done = cli(*RUN, "--outputs", "/dev/full")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "No space left" in done.err
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    job = subprocess.Popen(
        [*LFM2KIT, "convert", "wide-6", "there", "--random"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    while not any(p.is_dir() and list(p.iterdir()) for p in tmp_path.iterdir()):
        assert job.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # beyond the first use of NumPy's random module, whose import may swallow it
    job.send_signal(number)
    assert job.wait(30) == 128 + number
    assert not list(tmp_path.iterdir())


def test_a_bug_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """1 would say that the outputs are INVALID."""
    (tmp_path / "broken.py").write_text("""
import lfm2kit
from lfm2kit.backend import HOST


class Broken:
    def why_unsupported(self, spec):
        return None

    def memory(self, spec):
        return HOST

    def build(self, spec, weights):
        raise RuntimeError("a bug")


@lfm2kit.hookimpl
def lfm2kit_backends():
    yield lfm2kit.BackendPlugin("broken", "", lambda context: Broken(), 1)
""")
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lfm2kit]\nbroken = broken\n")
    done = lfm2kit("run", "-b", "broken", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3
    assert "RuntimeError: a bug" in done.stderr
    assert "lfm2kit env" in done.stderr


def test_tables_in_a_pipe_are_not_cut_off() -> None:
    done = lfm2kit("plan", COLUMNS="40")
    assert "…" not in done.stdout
    assert "layers.0.feed_forward" in done.stdout


@pytest.mark.parametrize("module", ["lfm2kit.process.streams", "lfm2kit.cli.console", "typer"])
def test_what_cannot_even_be_imported_is_one_line(module: str) -> None:
    """As where memory or open files are limited to less than the imports take."""
    code = f"import sys; sys.modules[{module!r}] = None; from lfm2kit.__main__ import script"
    command = [sys.executable, "-c", f"{code}; script()", "env"]
    done = subprocess.run(command, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("lfm2kit: error: lfm2kit cannot start (ModuleNotFoundError: ")
    assert "ulimit -a" in line
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_limit_of_the_machine_is_no_bug(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "argv", ["lfm2kit", *RUN])
    monkeypatch.setattr("lfm2kit.measuring.samples.read_inputs", fails)
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, "ulimit -a" in line) == (2, True)


def test_help_shows_the_defaults_that_options_describe_in_words(tmp_path: Path) -> None:
    shown = lfm2kit("run", "--help", cwd=tmp_path).stdout
    words = " ".join(shown.replace("│", " ").split())
    for default in ("all, up to 128", "inputs.bin beside the model", "nowhere"):
        assert f"[default: {default}]" in words
