"""README.md: its code for Python runs as it stands, and so does the backend of 15 minutes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import MLP
from tests.core.small import random_weights
from tests.plugins.pages import fences, files, page

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
OTHER_PAGES = sorted([*ROOT.glob("plugins/*/README.md"), *ROOT.glob("backends/*/README.md")])
WRITING, FROM_PYTHON, HIDDEN_STATES, WITH_A_STATE, BACKEND = fences(PAGE, "python")


def test_the_five_lines_that_write_text_write_english(capsys: pytest.CaptureFixture[str]) -> None:
    code = [line for line in WRITING.splitlines() if line]
    assert len(code) <= 5
    exec(WRITING, {})
    words = re.findall(r"[a-z]+", capsys.readouterr().out.lower())
    assert len(words) >= 20
    common = {"the", "of", "and", "to", "a", "in", "that", "is", "was", "it", "he", "be", "have"}
    assert len([word for word in words if word in common]) >= 5


def test_the_lines_for_logits_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    code = [line for line in FROM_PYTHON.splitlines() if line]
    assert len(code) <= 5
    names: dict[str, Any] = {}
    exec(FROM_PYTHON, names)
    assert names["logits"].dtype == np.float32
    shape, next_tokens = capsys.readouterr().out.split(") ")
    assert f"{shape})" in code[-1].partition("#")[2]
    assert len(next_tokens.split()) == 2


def test_the_lines_for_hidden_states_print_a_row_for_each_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: dict[str, Any] = {}
    exec(HIDDEN_STATES, names)
    hidden_size = names["model"].spec.embed_tokens.hidden_size
    assert capsys.readouterr().out == f"(5, {hidden_size})\n"


def test_the_code_with_a_state_has_the_logits_of_whole_sequences() -> None:
    names: dict[str, Any] = {}
    exec(WITH_A_STATE, names)
    model, tokens = names["model"], names["tokens"]
    assert len(tokens) == 79
    for end in range(70, 79):
        assert model.logits(Batch.of_sequences([tokens[:end]])).argmax() == tokens[end]
    fork, other = [*tokens[:64], 7, 8, 9], [*tokens[:70], 11]
    whole = model.logits(Batch.of_sequences([fork, other])).argmax(axis=1)
    assert [names["fork"], names["other"]] == whole.tolist()


def test_the_code_with_a_state_goes_back_and_shares_as_far_as_the_page_says() -> None:
    names: dict[str, Any] = {}
    exec(WITH_A_STATE, names)
    next_token = names["next_token"]
    next_token(range(40), 0, [0])
    with pytest.raises(ValueError, match="go back by at most 16"):
        next_token([5], 40 - 17, [0])
    next_token([5], 40 - 16, [0])
    next_token(range(64), 0, [0])
    next_token([5], 64, [0, 1])
    next_token([5], 50, [0])  # page 0 is not whole any more
    with pytest.raises(ValueError, match="page 1 does not go on from page 0 as it is now"):
        next_token([5], 65, [0, 1])


def test_what_the_page_types_for_a_file_of_specs_runs(tmp_path: Path) -> None:
    lines = re.findall(r"^    (.*\bmine/\w+\.toml.*)$", PAGE, re.MULTILINE)
    assert len(lines) == 4
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e"],
        input="\n".join(lines),
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Weights: random, seed 0" in done.stdout + done.stderr


def test_the_backend_of_15_minutes_builds_an_mlp() -> None:
    names: dict[str, Any] = {}
    exec(BACKEND, names)
    (plugin,) = names["lfm2kit_backends"]()
    spec = MLP(8, 12)
    weights = random_weights(spec)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    block = plugin.create(None).build(spec, weights)
    expected = ReferenceBackend().build(spec, weights)(x)
    np.testing.assert_allclose(block(x), expected, rtol=1e-5)


def test_the_project_of_15_minutes_is_that_of_the_tutorial() -> None:
    assert files(PAGE)["pyproject.toml"] == files(page("tutorial.md"))["pyproject.toml"]


@pytest.mark.parametrize(
    ("text", "line"),
    [(PAGE, r"^\| `(lfm2kit-\w+)` \|"), (page("plugins.md"), r"^- `(lfm2kit-\w+)`:")],
    ids=("README.md", "plugins.md"),
)
def test_every_complete_example_is_listed(text: str, line: str) -> None:
    there = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
    assert re.findall(line, text, re.MULTILINE) == there


@pytest.mark.parametrize("page", OTHER_PAGES, ids=lambda page: page.parent.name)
def test_what_a_readme_installs_is_the_folder_that_it_lies_in(page: Path) -> None:
    """Nothing is on an index by its name yet."""
    folder = str(page.parent.relative_to(ROOT))
    for line in page.read_text(encoding="utf-8").splitlines():
        assert "pip install" not in line or folder in line
