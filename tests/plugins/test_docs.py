"""docs/plugins.md: its files are written as they stand, installed, and its commands are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.building.loading import find_model
from tests.core.small import build, small_spec
from tests.plugins.distributions import added, environment, install_project, listing
from tests.plugins.pages import (
    ENTRIES,
    INSTALLING,
    fences,
    files,
    headings,
    page,
    typed,
    without_index,
)

PAGE = page("plugins.md")
FILES = files(PAGE)
# It begins with the tutorial's project, and later writes other entry points over those there.
(ENTRY_POINTS,) = (text for text in fences(PAGE, "toml") if text.startswith(ENTRIES))
FIRST_PROJECT = files(page("tutorial.md"))["pyproject.toml"]
GROWN = {**FILES, "pyproject.toml": FIRST_PROJECT.partition(ENTRIES)[0] + ENTRY_POINTS}


def installed(folder: Path, contents: dict[str, str]) -> Path:
    """Write the page's files into `folder`, and install the plugin into its folder `site`."""
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    install_project(folder, folder / "site", folder / "dist")
    return folder


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("grown"), GROWN)


def run(
    command: str, project: Path, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a line of the page in a folder, or else that of the project, with this interpreter."""
    words = shlex.split(command)
    variables = [
        words.pop(0).split("=", 1) for word in list(words) if re.match(r"[A-Z_0-9]+=", word)
    ]
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder or project,
        env=environment(project / "site", **dict(variables)),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_pip_can_install_what_the_page_installs(grown: Path) -> None:
    for command in dict.fromkeys(line for line in typed(PAGE) if line.startswith(INSTALLING)):
        done = run(without_index(command), grown)
        assert done.returncode == 0, done.stdout + done.stderr


BEGINNING = [line for line in typed(PAGE) if line.startswith("lfm2kit backends new ")]
COMMANDS = [line for line in typed(PAGE) if not line.startswith(INSTALLING)]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in BEGINNING])
def test_every_command_of_the_page_works(command: str, grown: Path) -> None:
    if command == "lfm2kit runs":
        done = run("lfm2kit run --backend reference -n 1", grown)
        assert done.returncode == 0, done.stdout + done.stderr
    done = run(command, grown)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_can_be_begun_as_the_page_says(grown: Path, tmp_path: Path) -> None:
    (command,) = BEGINNING
    done = run(command, grown, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [folder.name for folder in tmp_path.iterdir()] == ["lfm2kit-another"]


def test_the_grown_plugin_runs_all_its_blocks_in_both_memories(grown: Path) -> None:
    plan = "reference,mlp=mine,experts=mine,conv=mine,head=mine"
    done = run(f"lfm2kit run --backend {plan} --threads 2 -n 4 -v", grown)
    assert (done.returncode, "\nVALID\n" in done.stdout) == (0, True), done.stdout + done.stderr
    assert "mine: it has one thread, whatever the user asks for" in done.stderr
    blocks = json.loads(run(f"lfm2kit plan --backend {plan} --json -", grown).stdout)["blocks"]
    copies = {block["block"]: block["copy"] for block in blocks if block["copy"]}
    assert copies == {"lm_head": "host <-> lfm2kit_mine"}


def test_the_command_of_the_page_says_what_is_missing(grown: Path) -> None:
    (grown / "runs.jsonl").unlink(missing_ok=True)
    done = run("lfm2kit runs", grown)
    assert done.returncode == 2
    says = "there is no runs.jsonl here; make it with `lfm2kit run`"
    assert done.stderr == f"lfm2kit: error: {says}\n"


def test_importing_the_grown_plugin_imports_none_of_its_work(grown: Path) -> None:
    code = "import sys, lfm2kit_mine; print([m for m in sys.modules if m.startswith('lfm2kit_m')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.sep,
        env=environment(grown / "site"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "['lfm2kit_mine']", done.stderr


def module(name: str) -> dict[str, Any]:
    """Return the names that a file of the page defines, which needs no other file of the page."""
    names: dict[str, Any] = {"__name__": __name__}  # where a dataclass looks for its module
    exec(GROWN[f"lfm2kit_mine/{name}.py"], names)
    return names


def test_the_wrapper_of_the_page_wraps_what_it_says() -> None:
    from lfm2kit.specs import MLP, LMHead

    hook = module("checked")["lfm2kit_block_wrapper"]
    assert hook("lm_head", LMHead(5, 2)) is None
    wrapped = hook("layers.0.feed_forward", MLP(2, 3)).wrap(lambda x: x)
    assert wrapped(1.0) == 1.0
    with pytest.raises(AssertionError, match="left the numbers"):
        wrapped(float("nan"))


def test_the_rewrite_of_the_page_keeps_the_bits() -> None:
    (rewrite,) = module("halves")["lfm2kit_rewrites"]()
    batch = Batch.of_sequences([[3, 1, 4], [1, 5]])
    expected = build(small_spec()).logits(batch)
    assert np.array_equal(build(small_spec(), rewrites=[rewrite]).logits(batch), expected)


def test_the_reader_of_the_page_reads_what_the_plugin_for_int8_makes(tmp_path: Path) -> None:
    from lfm2kit_int8 import open_folder
    from lfm2kit_int8.__main__ import quantise

    quantise(find_model("tiny"), tmp_path / "model")
    expected = open_folder(tmp_path / "model")
    (reader,) = module("int8")["lfm2kit_checkpoints"]()
    assert not reader.recognises(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("int8-by-rows", "int8-of-mine"))
    assert reader.recognises(tmp_path / "model")
    read = reader.open(tmp_path / "model")
    assert read.spec == expected.spec
    assert read.weights.keys() == expected.weights.keys()
    for name in ("embed_tokens.weight", "layers.0.feed_forward.w1.weight"):
        assert read.weights[name].format.name == "I8"
        assert np.array_equal(read.weights.float32(name), expected.weights.float32(name))


def test_what_the_examples_of_the_last_part_bring_is_found(grown: Path) -> None:
    found = listing(grown / "site")
    assert not [row["name"] for row in found.values() if row["not_used"]]
    assert "halves" in added(found, "rewrite")
    assert "mine_int8" in added(found, "reader")


def test_every_link_within_the_page_has_its_heading() -> None:
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings(PAGE)


def test_the_table_of_blocks_names_every_spec_and_its_kind() -> None:
    from lfm2kit import specs

    blocks = {
        s.kind: s.__name__ for s in specs.Spec.__subclasses__() if s.__module__ == specs.__name__
    }
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \| `\(", PAGE, re.MULTILINE))
    assert rows == blocks
