"""What the environment says of the launcher that started this process."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from lfm2kit.cli.ranks import joined_job
from lfm2kit.errors import Lfm2kitError
from lfm2kit.ranks.launchers import LAUNCHERS, started
from tests.checkpoint.typed import Cli, Typed

STEP = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in LAUNCHERS:
        for variable in (launcher.rank, launcher.size, "SLURM_PTY_PORT"):
            if variable is not None:
                monkeypatch.delenv(variable, raising=False)


def set_all(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "launcher", "size"),
    [
        (STEP, "srun", 4),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec", 2),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}, "mpirun", 3),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "6"}, "jsrun", 6),
        ({"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "6"}, "flux run", 6),
        ({"PALS_RANKID": "3"}, "mpiexec", 4),  # at least
        ({"PMI_RANK": "1", "PMI_SIZE": "8", **STEP}, "mpiexec", 8),  # which srun started
    ],
)
def test_one_of_several_processes_knows_it(
    variables: dict[str, str], launcher: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(variables, monkeypatch)
    found = started()
    assert found is not None
    assert (found.launcher.name, found.size) == (launcher, size)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # the shell of salloc
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a script of sbatch
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1", **STEP},  # mpiexec -n 1 in a step
        {"PALS_RANKID": "0"},
        {"PMIX_RANK": "0"},
        {"PMI_RANK": "first", "PMI_SIZE": "many"},
    ],
)
def test_a_process_alone_is_not_one_of_several(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(variables, monkeypatch)
    assert started() is None


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_typed_into_the_shell_of_a_step_runs_once(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all({**STEP, "SLURM_PTY_PORT": "12345"}, monkeypatch)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: is_terminal))
    assert (started() is None) == is_terminal


def test_a_step_without_ranks_ends_with_what_to_type_said_by_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(STEP, monkeypatch)
    with pytest.raises(Lfm2kitError, match=r"srun started 4.*--mpi=pmi2.*--independent"):
        joined_job("mpi")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(typer.Exit) as ended:
        joined_job("mpi")
    assert ended.value.exit_code == 2


@pytest.mark.parametrize(
    "command", [["plan"], ["bench", "-b", "reference", "-n", 1], ["convert", "tiny", "copy.bin"]]
)
def test_a_command_that_knows_no_ranks_is_refused_once_where_a_launcher_started_copies(
    command: list[object], cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    set_all({"PMI_RANK": "0", "PMI_SIZE": "4"}, monkeypatch)
    says = "mpiexec started 4 processes (PMI_SIZE=4), and each would do the same; start this"
    cli(*command).assert_fails(says)
    monkeypatch.setenv("PMI_RANK", "3")
    assert cli(*command) == Typed(2, "", "")
    assert list(tmp_path.iterdir()) == []


def test_ranks_without_their_transport_do_not_run_as_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all({"PMI_RANK": "0", "PMI_SIZE": "4"}, monkeypatch)
    monkeypatch.setattr("lfm2kit.building.plugins._installed", list)
    with pytest.raises(Lfm2kitError, match=r"unknown transport 'mpi'.*PMI_SIZE=4.*--independent"):
        joined_job("mpi")


def test_alone_the_default_transport_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2kit.building.plugins._installed", list)
    assert joined_job("mpi") is None
    with pytest.raises(Lfm2kitError, match="unknown transport 'pigeon'"):
        joined_job("pigeon")
