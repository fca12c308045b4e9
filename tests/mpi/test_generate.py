"""`lfm2kit generate` on the ranks of real MPI jobs: the tokens of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.generating.folders import loaded, model_folder
from tests.mpi.test_faults import LETS_ANYONE_RUN

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec

pytestmark = pytest.mark.mpi
PROMPTS = ["It is a truth", "hello"]
A_WHILE = 120  # seconds: a job that has not ended by then hangs


def generate(
    *words: object, launcher: tuple[str, ...] = (), stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [*launcher, sys.executable, "-m", "lfm2kit", "generate", "-b", "reference"]
    options = ["--threads", 1, "--seed", 1, "--max-tokens", 6, *words]
    return subprocess.run(
        [*command, *map(str, options)], input=stdin, capture_output=True, text=True,
        timeout=A_WHILE,
        env=os.environ | LETS_ANYONE_RUN | {"OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip


def test_two_ranks_write_the_text_of_one_process(tmp_path: Path) -> None:
    """And a file of answers: one that misses the wrong line's answer, and then one that is kept."""
    folder, output = model_folder(tmp_path / "m"), tmp_path / "answers.jsonl"
    expected = loaded(folder).generate(PROMPTS, seed=1, max_tokens=6)
    alone = generate(PROMPTS[0], "-m", folder, "--json", "-", launcher=(find_mpiexec(), "-n", "2"))
    assert alone.returncode == 0, alone.stderr
    record = json.loads(alone.stdout)
    assert (record["ranks"], record["answers"][0]["text"]) == (2, expected[0])
    lines = [json.dumps({"prompt": prompt}) for prompt in [*PROMPTS, ""]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    for _ in range(2):
        done = generate(
            "-m", folder, "--ranks", 2, "--file", tmp_path / "prompts.jsonl", "--output", output,
            "--keep-going",
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("lfm2kit: error: 1 of 3 prompts have no")
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        assert [one["answers"][0]["text"] for one in answers[:2]] == expected
        assert answers[2]["error"].startswith("the prompt is empty")
    assert "has 2 of 3 answers already" in done.stderr


def test_rank_0_reads_a_stdin_that_the_launcher_would_not_pass_on(tmp_path: Path) -> None:
    """MPICH's mpiexec fails if it gets more than 64 KB before a rank reads them."""
    folder, long = model_folder(tmp_path / "m"), "It is a truth. " * 20000
    done = generate("-", "-m", folder, "--ranks", 2, stdin=long)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lfm2kit: error: ")]
    assert "a prompt of 200001 tokens" in line
