"""`NODES=4 ./run.sh`: what is started on the nodes, and what is wrong with it in one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SOURCED = """
set -euo pipefail
source "$1/environment.sh"
source "$1/nodes.sh"
on_nodes "$2" lfm2kit run
echo "${command[@]}"
"""


def on_nodes(
    nodes: str, folder: Path, *, has_slurm: bool = True, allocated: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Return what `run.sh` would start, where Slurm is there or an allocation is."""
    if has_slurm:
        (folder / "salloc").write_text("#!/bin/sh\n")
        (folder / "salloc").chmod(0o755)
    path = f"{folder}:/usr/bin:/bin" if has_slurm else str(folder)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    if allocated is not None:
        variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(allocated)}
    return subprocess.run(
        ["/bin/bash", "-c", SOURCED, "bash", str(SCRIPTS), nodes],
        capture_output=True, text=True, env=variables | {"PATH": path},
    )  # fmt: skip


def test_slurm_allocates_whole_nodes_for_a_rank_each(tmp_path: Path) -> None:
    done = on_nodes("4", tmp_path)
    whole = "salloc --nodes 4 --ntasks-per-node 1 --exclusive"
    assert (done.stdout, done.stderr) == (f"{whole} lfm2kit run --ranks 4\n", "")


def test_an_allocation_is_not_allocated_again(tmp_path: Path) -> None:
    done = on_nodes("4", tmp_path, allocated=4)
    assert (done.stdout, done.stderr) == ("lfm2kit run --ranks 4\n", "")


def test_ranks_without_slurm_are_told_of_it(tmp_path: Path) -> None:
    done = on_nodes("4", tmp_path, has_slurm=False)
    assert done.stdout == "lfm2kit run --ranks 4\n"
    assert done.stderr.startswith("lfm2kit: NODES=4, but there is no Slurm here")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("nodes", "allocated", "says"),
    [
        ("4", 2, "NODES=4, but this allocation of Slurm has 2"),
        ("four", None, "NODES=four: expected a number of nodes"),
        ("0", None, "NODES=0: expected a number of nodes"),
        ("-1", None, "NODES=-1: expected a number of nodes"),
        ("n1,n2", None, "NODES=n1,n2: expected a number of nodes"),
        ("99999999999999999999", None, "NODES=99999999999999999999: expected a number"),
    ],
)
def test_nodes_that_cannot_be_had_are_one_line(
    nodes: str, allocated: int | None, says: str, tmp_path: Path
) -> None:
    done = on_nodes(nodes, tmp_path, allocated=allocated)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says in done.stderr
