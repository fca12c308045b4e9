"""`parametrize_transport_checks`: a case for each check, whose verdict is the test's."""

from __future__ import annotations

import importlib

import pytest

import lfm2kit.testing
from lfm2kit.testing.jobs import JOB_CHECKS
from lfm2kit.testing.runner import Result

parametrize = importlib.import_module("lfm2kit.testing.parametrize")


def test_each_check_is_a_case_and_a_failed_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def result(name: str, transport: str, launcher: object, ranks: int) -> Result:
        asked.append((name, transport, ranks))
        return Result(name, "failed" if name == "hang" else "passed", "no end", 0.0)

    monkeypatch.setattr(parametrize, "run_job_check", result)
    cases = lfm2kit.testing.parametrize_transport_checks("mpi", ranks=3).args[1]
    assert [case.id for case in cases] == list(JOB_CHECKS)
    for case in cases:
        (check,) = case.values
        if case.id == "hang":
            with pytest.raises(lfm2kit.testing.CheckFailed, match="no end"):
                check()
        else:
            check()
    assert asked == [(name, "mpi", 3) for name in JOB_CHECKS]
