"""`lfm2kit backends check`: what it runs, what it says of a failure, and how to repeat it."""

from __future__ import annotations

import json

import pytest

from lfm2kit.reference import feed_forward
from tests.checkpoint.typed import Cli

CHECK = ("backends", "check", "reference")


def fails(self: object, x: object) -> None:
    raise RuntimeError("no registers")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward.MLP, "__call__", fails)


@pytest.mark.usefixtures("broken")
def test_a_failure_says_where_it_was_and_how_to_repeat_it(cli: Cli) -> None:
    done = cli(*CHECK, "--only", "norm,mlp", "--seed", "3")
    assert done.code == 1
    for words in ("RuntimeError: no registers; raised at ", "test_checking.py:", "last call: "):
        assert words in done.out
    again = "lfm2kit backends check reference --only mlp --seed 3"
    assert f"to repeat what failed: {again}\n" in done.out
    assert "with tracebacks: LFM2KIT_TRACEBACK=1\n" in done.out
    assert done.err == ""


@pytest.mark.usefixtures("broken")
def test_a_failure_shows_its_traceback_if_it_is_asked_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM2KIT_TRACEBACK", "1")
    done = cli(*CHECK, "--only", "mlp", "--json", "-")
    assert "Traceback (most recent call last):" in done.err
    assert "runner.py" in done.err
    assert "with tracebacks" not in done.err
    (result,) = json.loads(done.out)["results"]
    assert "no registers" in result["traceback"]
    assert result["notes"][0].startswith("raised at ")
