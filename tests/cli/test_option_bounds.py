"""Sizes on the command line have bounds, and two options that say one thing are both named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfm2kit.building.options import Options
from lfm2kit.errors import Lfm2kitError
from tests.checkpoint.typed import Cli

PATHS = ["--inputs", "--answers", "--outputs", "--record-load", "--plan", "--load", "--json"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["run", "--random-inputs", "1000000000"], ["--random-inputs 1000000000", "1048576"]),
        (["run", "--random-inputs", "1048576", "-n", "1048576"], ["1048576 samples", "at once"]),
        (["run", "-n", "1" + "0" * 5000], ["-n 1000"]),
        *[
            (["run", "-n", n], ["expected a whole number of 1"])
            for n in ("1_0", " 5", "\u0665", "1.0")
        ],
        (["run", "--batch-size", "1048577"], ["--batch-size 1048577", "1048576"]),
        (["run", "--threads", "1048577"], ["--threads 1048577", "1048576"]),
        (["run", "--seed", str(2**63)], ["--seed", str(2**63 - 1)]),
        (["plan", "--tokens", "10000000000"], ["--tokens 10000000000", "1048576"]),
        (["bench", "--seq-len", "1000000000"], ["--seq-len 1000000000", "1048576"]),
        (["bench", "--seq-len", "16,0"], ["--seq-len 16,0", "1 or more, such as 16,4096"]),
        (["bench", "-n", "1,1000000000"], ["-n 1,1000000000", "1048576"]),
        (["bench", "-n", "1048576", "--seq-len", "1000"], ["1048576 samples of 1000 tokens"]),
    ],
)
def test_a_size_beyond_its_bound_is_one_line(
    cli: Cli, command: list[str], words: list[str]
) -> None:
    cli(*command).assert_fails(*words)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *[(["run", option, ""], f"{option} '': the path is empty") for option in PATHS],
        (["generate", "--file", "", "--output", "o"], "--file '': the path is empty"),
        (["generate", "--file", "p", "--output", ""], "--output '': the path is empty"),
        (["generate", "a", "--grammar", ""], "--grammar '': the path is empty"),
        (["generate", "a", "--json-schema", ""], "--json-schema '': expected a file or a schema"),
        (["generate", "a", "--regex", ""], "--regex '': expected a text that is not empty"),
        (["generate", "a", "--stop", ""], "--stop '': no text to stop at may be empty"),
        (["generate", "a", "--logit-bias", ""], "--logit-bias '': expected a token id and a"),
        (["generate", ""], "the prompt is empty"),
        (["convert", "tiny", ""], "TARGET '': the path is empty"),
        (["calibrate", "--output", ""], "--output '': the path is empty"),
        (["backends", "check", "reference", "--only", ""], "unknown check ''"),
        (["transports", "check", "mpi", "--only", ""], "unknown check ''"),
        (["plan", "--rewrite", ""], "--rewrite '': expected a name"),
        (["bench", "-n", ""], "-n '': expected whole numbers"),
    ],
)
def test_an_empty_value_is_one_line(cli: Cli, command: list[str], said: str) -> None:
    """A shell makes it of a variable that is not set."""
    cli(*command).assert_fails(said)


def test_an_empty_path_is_one_line_from_python() -> None:
    for name in ("plan", "load", "rates"):
        with pytest.raises(Lfm2kitError, match=f"{name}='': expected the path"):
            Options(**{name: ""})


def test_a_plan_file_and_the_environments_plan_are_both_named(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LFM2KIT_BACKEND", "reference")
    cli("run", "--plan", tmp_path / "p.toml").assert_fails("LFM2KIT_BACKEND=reference", "p.toml")
    cli("run", "--plan", tmp_path / "p.toml", "-b", "auto").assert_fails("--backend auto", "p.toml")


def test_bench_takes_the_environments_plan_unless_one_is_given(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM2KIT_BACKEND", "nosuch")
    cli("bench", "-n", "1", "-r", "1").assert_fails("'nosuch'")
    assert cli("bench", "-n", "1", "-r", "1", "-b", "reference").code == 0
