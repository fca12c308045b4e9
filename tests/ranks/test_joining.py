"""A program of a user beside launchers: a job of one rank, and copies that are refused."""

from __future__ import annotations

import importlib

import pytest

from lfm2kit import Batch, joined_job, load_model
from lfm2kit.errors import Lfm2kitError
from lfm2kit.ranks.joining import Alone
from lfm2kit.testing import check_exchange, check_transport
from lfm2kit.transport import World

COPIES = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in importlib.import_module("lfm2kit.ranks.launchers").LAUNCHERS:
        for variable in (launcher.rank, launcher.size):
            if variable is not None:
                monkeypatch.delenv(variable, raising=False)


def test_a_process_alone_is_a_job_of_one_rank() -> None:
    check_transport(Alone())
    check_exchange(Alone())
    with joined_job() as job:
        assert job.world == World()
        model = load_model("tiny", "reference", job=job)
        assert model.logits(Batch.of_sequences([[1, 2]])).shape == (1, 1024)


def test_what_is_raised_alone_reaches_the_user() -> None:
    with pytest.raises(SystemExit, match="5"), joined_job():
        raise SystemExit(5)


def test_copies_do_not_load_a_model_each_unless_they_are_meant_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in COPIES.items():
        monkeypatch.setenv(name, value)
    says = r"srun started 4 processes \(SLURM_STEP_NUM_TASKS=4\), and each would load the whole"
    with pytest.raises(Lfm2kitError, match=says):
        load_model("tiny", "reference")
    assert load_model("tiny", "reference", independent=True).spec.layers


def test_copies_that_are_not_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lfm2kit_mpi", reason="the default transport")
    for name, value in COPIES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Lfm2kitError, match="but not as ranks of one job"), joined_job():
        pass


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(Lfm2kitError, match="unknown transport 'pigeon'"), joined_job("pigeon"):
        pass
