"""What a failure says: which call it was, and where in the backend's code an error was raised."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.reference import feed_forward
from lfm2kit.testing.call_log import CallLog
from lfm2kit.testing.compare import assert_close
from lfm2kit.testing.runner import judged
from lfm2kit.testing.verdicts import CheckFailed
from tests.conformance import broken
from tests.conformance.broken import BrokenBackend
from tests.conformance.test_kit import pytest_elsewhere

MLP = specs.MLP(24, 40)
CONV = specs.ShortConv(24, 3)


def line_of(function: Any, text: str) -> int:
    """Return the number of the line of a function's source that contains `text`."""
    lines, first = inspect.getsourcelines(function)
    return next(first + i for i, line in enumerate(lines) if text in line)


class Raises(feed_forward.MLP):
    def __call__(self, x: Any) -> Any:
        return np.concatenate([self._inner(x)])

    def _inner(self, x: Any) -> Any:
        return np.zeros(3).reshape(len(x), 7)


def test_an_error_is_placed_in_the_innermost_code_of_the_backend() -> None:
    result = judged("mlp", BrokenBackend({specs.MLP: Raises}))
    assert result.detail.startswith("ValueError: cannot reshape")
    line = line_of(Raises._inner, "reshape")
    place, call = result.notes
    assert place.endswith(f"test_failures.py:{line} in Raises._inner")
    assert call == f"last call: number 1 of {MLP}, 0 rows"
    assert f"line {line}, in _inner" in result.traceback


def test_an_error_while_building_is_no_call() -> None:
    def refuses(spec: Any, weights: Any) -> Any:
        raise KeyError("w4")

    place, block = judged("mlp", BrokenBackend({specs.MLP: refuses})).notes
    assert f"test_failures.py:{line_of(refuses, 'raise')} in " in place
    assert block == f"last block: {MLP}, not called yet"


def test_a_wrong_result_says_which_sequences_and_pages_it_was_about() -> None:
    backend = BrokenBackend({specs.ShortConv: broken.ConvStateNotReset})
    (call,) = judged("state-fresh-at-position-zero", backend).notes
    said = f"{CONV}, 6 rows, lengths [6], starts [0], pages [[0]], with a state"
    assert call == f"last call: number 2 of {said}"


def test_a_long_batch_is_said_in_brief() -> None:
    log = CallLog()
    log.called(CONV, 1, (np.zeros((300, 24)), Batch.of_sequences([[1]] * 300), None))
    assert log.note() == (
        f"last call: number 1 of {CONV}, 300 rows, lengths [1, 1, 1, 1, 1, 1, 1, 1, ... 300 in all]"
    )


def test_the_worst_element_is_placed_among_all_rows() -> None:
    want = np.ones((5, 4), np.float32)
    got = want.copy()
    got[3, 2] = 2
    with pytest.raises(CheckFailed, match=r"at \[3, 2\]: got 2, want 1"):
        assert_close(got, want, 1e-5, "x", np.array([1, 3, 4]))


TESTS = """
import lfm2kit.testing
from lfm2kit.reference.feed_forward import MLP

plain, calls = MLP.__call__, []

def call(self, x):
    calls.append(x)
    {body}

MLP.__call__ = call

@lfm2kit.testing.parametrize_backend_checks("reference")
def test_conformance(check):
    check()
"""


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("raise ValueError('of registers')", ("of registers", "raised at test_mine.py:9 in call")),
        ("return plain(self, x) * len(calls)", ("not the same bits", "last call: number 2 of MLP")),
    ],
)
def test_pytest_shows_no_frame_of_the_kit(
    body: str, shown: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS.format(body=body), encoding="utf-8")
    monkeypatch.delenv("LFM2KIT_TRACEBACK", raising=False)
    code, output = pytest_elsewhere(tmp_path, "-k", "repeatable")
    assert code == 1
    assert all(words in output for words in shown), output
    assert "lfm2kit/testing" not in output
    monkeypatch.setenv("LFM2KIT_TRACEBACK", "1")
    assert "lfm2kit/testing/runner.py" in pytest_elsewhere(tmp_path, "-k", "repeatable")[1]
