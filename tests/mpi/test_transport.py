"""The transport and the expert-parallel block, on real ranks, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.job import ON_EXIT_CODES
from lfm2kit_mpi.launcher import MpiLauncher, find_mpiexec, flags_for
from lfm2kit_mpi.library import fits

from tests.mpi.test_faults import LETS_ANYONE_RUN

A_WHILE = 120


def run_mpi(ranks: int, script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script on real ranks; `transport`, `world`, `np` and `rng` are there."""
    path = tmp_path / "script.py"
    path.write_text(f"{PROLOGUE}\n{script}\ntransport.finish(0)\n")
    return subprocess.run(
        [find_mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", str(path)],
        capture_output=True,
        text=True,
        timeout=A_WHILE,
        env=os.environ | LETS_ANYONE_RUN,
    )


PROLOGUE = """
import numpy as np
from lfm2kit_mpi.job import ON_EXIT_CODES
from lfm2kit_mpi.launcher import MpiLauncher
transport = MpiLauncher().connect()
world = transport.world
rng = np.random.default_rng(world.rank)
"""

CONTRACT = """
from lfm2kit.testing import check_exchange, check_transport
check_transport(transport)
check_exchange(transport)
print("fine")
"""

EXPERTS = """
from lfm2kit import specs
from lfm2kit.memory import HOST
from lfm2kit.model import RoutedExperts
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks, parallel_moe
from lfm2kit.transport import evenly, held_once
from lfm2kit.weights import Weights

E, K, H = {experts}, {k}, 8
router = specs.Router(H, E, K, True, True, 1.0)
experts = specs.Experts(H, 6, E, K, range(E))
whole = specs.SparseMoe(router, experts)
same = np.random.default_rng(9)
weights = Weights.of_arrays({{n: same.normal(0, 0.5, s) for n, s in whole.parameters().items()}})
if {one}:
    weights = Weights({{**weights, "expert_bias": Weights.of_arrays(
        {{"expert_bias": np.r_[9.0 * np.arange(E, 0, -1) * (np.arange(E) < K)]}})["expert_bias"]}})
backend = ReferenceBackend()
alone = RoutedExperts(whole, backend.build(router, weights), backend.build(experts, weights))
rewrite = experts_over_ranks(world, transport)
owners = held_once(evenly(world.size, E), world.size)
if {one}:  # the experts that all tokens choose are on every rank
    owners = tuple((rank,) * K + some[K:] for rank, some in enumerate(owners))
mine = parallel_moe(whole, world.rank, owners)
block = rewrite.joins[type(mine)](HOST).make(
    mine, router=backend.build(router, weights), experts=backend.build(mine.experts, weights))
owners = np.array(mine.owners[world.rank])
for tokens in (0, 1, 17) if world.rank % 2 else (5, 0, 9):
    x = rng.normal(size=(tokens, H)).astype(np.float32)
    np.testing.assert_array_equal(block(x), alone(x) if tokens else x)
    counted = block.exchange.counted()
    ranks = [set(owners[ids]) - {{world.rank}} for ids in alone.router(x)[0]]
    assert not {one} or not any(ranks)
    assert counted.dispatch.rows == sum(map(len, ranks))
    assert counted.dispatch.bytes == sum(map(len, ranks)) * 4 * (H + 2 * K)
    assert counted.dispatch.messages == len(set().union(*ranks))
    assert (counted.counts.messages, counted.counts.bytes) == (world.size - 1, 4 * world.size - 4)
print("fine")
"""


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 3])
def test_it_keeps_the_contract_of_a_transport(ranks: int, tmp_path: Path) -> None:
    done = run_mpi(ranks, CONTRACT, tmp_path)
    assert done.stdout.count("fine") == ranks, done.stderr  # ranks may share a line


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "experts", "k", "one"),
    [
        pytest.param(2, 5, 3, False, marks=pytest.mark.long),
        pytest.param(3, 12, 4, False, marks=pytest.mark.long),
        (4, 3, 2, False),
        (4, 33, 2, True),
    ],
    ids=["uneven", "three", "more-ranks-than-experts", "all-tokens-to-the-same-experts"],
)
def test_every_token_gets_the_bits_that_one_process_gives_it(
    ranks: int, experts: int, k: int, one: bool, tmp_path: Path
) -> None:
    done = run_mpi(ranks, EXPERTS.format(experts=experts, k=k, one=one), tmp_path)
    assert done.stdout.count("fine") == ranks, done.stderr  # ranks may share a line


@pytest.mark.mpi
def test_local_ranks_are_the_places_on_this_machine(tmp_path: Path) -> None:
    script = "assert (world.local_size, world.local_rank) == (4, world.rank); print('fine')"
    done = run_mpi(4, script, tmp_path)
    assert done.stdout.count("fine") == 4, done.stderr


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "8"}, None),
        ({"PMI_SIZE": "many"}, None),
    ],
)
def test_the_environment_says_whether_this_is_a_job(
    environment: dict[str, str], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert MpiLauncher().world_size() == size


@pytest.mark.parametrize(
    ("version", "nodes", "ranks", "flags"),
    [
        ("HYDRA build details", None, 4, ""),
        ("HYDRA build details", 1, 4, ""),
        ("HYDRA build details", 4, 4, "-ppn 1"),
        ("HYDRA build details", 4, 6, "-ppn 2"),
        ("mpirun (Open MPI) 5.0.9", None, 4, "--oversubscribe --bind-to none"),
        (
            "mpirun (Open MPI) 5.0.9",
            4,
            6,
            "--oversubscribe --bind-to none --map-by ppr:2:node",
        ),
    ],
)
def test_ranks_are_spread_evenly_over_an_allocation_and_not_bound_to_a_core(
    version: str, nodes: int | None, ranks: int, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    if nodes is not None:
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    assert " ".join(flags_for(version, ranks)) == flags


@pytest.mark.parametrize(
    ("vendor", "variable", "is_fitting"),
    [
        ("MPICH", "PMI_SIZE", True),
        ("MPICH", "OMPI_COMM_WORLD_SIZE", False),
        ("Intel MPI", "OMPI_COMM_WORLD_SIZE", False),
        ("Open MPI", "OMPI_COMM_WORLD_SIZE", True),
        ("Open MPI", "PMI_SIZE", True),  # as srun --mpi=pmi2 sets it
    ],
)
def test_the_mpirun_of_another_mpi_is_noticed_before_mpi_starts(
    vendor: str, variable: str, is_fitting: bool
) -> None:
    assert fits(vendor, {variable: "2"}) == is_fitting


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MPI4PY_LIBMPI", "/nowhere/libmpi.so", "there is no MPI here: cannot load MPI library"),
        ("OMPI_COMM_WORLD_SIZE", "2", "Open MPI's mpirun started this rank, but mpi4py has "),
    ],
)
def test_a_rank_whose_mpi_cannot_join_ends_in_one_line(
    variable: str, value: str, says: str
) -> None:
    mpi = subprocess.run([find_mpiexec(), "--version"], capture_output=True, text=True).stdout
    if "Open MPI" in mpi or "OpenRTE" in mpi:
        pytest.skip("this machine's mpiexec is Open MPI's")
    environment = {**os.environ, "PMI_SIZE": "2", "PMI_RANK": "0", variable: value}
    command = [sys.executable, "-m", "lfm2kit", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=A_WHILE, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert says in done.stderr


NOTHING_IN_COMMON = {
    "the first rank gets no memory": "common_array._made = lambda nbytes: None",
    "it is not the first rank's memory": """
of = common_array.Place.of
common_array.Place.of = lambda descriptor: of(descriptor)._replace(number=1)
""",
    "one rank cannot see it": """
import os
if world.rank == 1:
    open_ = os.open
    os.open = lambda path, *flags: open_("/nowhere" if "/fd/" in str(path) else path, *flags)
""",
}


@pytest.mark.parametrize("why", NOTHING_IN_COMMON)
def test_ranks_agree_that_they_have_no_memory_in_common(why: str, tmp_path: Path) -> None:
    script = f"""
from lfm2kit_mpi import common_array
{NOTHING_IN_COMMON[why]}
assert transport.shared((2, 3), np.float32) is None
print("agreed")
"""
    done = run_mpi(2, script, tmp_path)
    assert done.stdout.count("agreed") == 2, done.stderr


OPEN_MPI_ON_AN_EXIT_CODE = """\
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
mpiexec detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[28273,1],0]
  Exit code:    2
--------------------------------------------------------------------------
"""
A_WARNING = """\
--------------------------------------------------------------------------
WARNING: There was an error initializing an OpenFabrics device.
--------------------------------------------------------------------------
"""


@pytest.mark.parametrize("others", ["", A_WARNING])
def test_what_open_mpi_says_of_an_exit_code_is_left_out_and_its_warnings_are_not(
    others: str,
) -> None:
    assert ON_EXIT_CODES.sub("", others + OPEN_MPI_ON_AN_EXIT_CODE + others) == others + others
