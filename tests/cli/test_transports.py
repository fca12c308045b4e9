"""`lfm2kit transports check` says what it has checked."""

from __future__ import annotations

import importlib

from lfm2kit.memory import HOST
from lfm2kit.testing.runner import Result
from tests.core.test_model import Elsewhere


def test_a_result_says_that_exchanges_past_the_host_were_left_out() -> None:
    with_place = importlib.import_module("lfm2kit.cli.transports")._with_place
    passed = Result("exchange", "passed", "", 0.0)
    assert "only through the host's memory; --backend NAME" in with_place(passed, HOST).detail
    assert "'elsewhere'" in with_place(passed, Elsewhere()).detail
    for other in (passed._replace(id="hang"), passed._replace(verdict="failed", detail="why")):
        assert with_place(other, HOST) == other
