"""Random examples: what is drawn, what is found, and what is said of the smallest one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.reference import feed_forward
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS, draws
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.examples import judge_call
from lfm2kit.testing.guarding import Guarding
from lfm2kit.testing.programs import ROOM, Program, Run
from lfm2kit.testing.runner import Result, judged
from lfm2kit.testing.scope import EXAMPLES, Scope, examples_here
from lfm2kit.testing.sessions import Pages
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed
from tests.checkpoint.typed import Cli
from tests.conformance import broken
from tests.conformance.broken import BrokenBackend


def found(name: str, backend: Any, examples: int = 15) -> Result:
    return judged(name, backend, scope=Scope(examples=examples))


class WrongFrom6Rows(feed_forward.MLP):
    """An MLP whose sixth row, and those after it, are off."""

    def __call__(self, x: Any) -> Any:
        return super().__call__(x) * (1 + (np.arange(len(x)) >= 5)[:, None])


def test_the_smallest_call_that_is_wrong_is_shown() -> None:
    result = found("random-calls", BrokenBackend({specs.MLP: WrongFrom6Rows}))
    assert result.verdict == "failed"
    smallest = specs.MLP(3, 3)
    assert result.detail.startswith(f"{smallest}, sequences of [6] rows (seed 0): ")
    assert "at [5, " in result.detail
    assert result.notes == (f"last call: number 1 of {smallest}, 6 rows",)


def test_the_smallest_program_that_is_wrong_is_shown() -> None:
    result = found("random-programs", BrokenBackend({specs.ShortConv: broken.ConvStateNotReset}))
    assert result.verdict == "failed"
    assert "ShortConv(hidden_size=3, kernel_size=2, bias=False), sequence 0 after {0: " in (
        result.detail
    )


def test_a_failure_that_does_not_repeat_is_one_all_the_same() -> None:
    calls = []

    def once(example: int) -> None:
        calls.append(example)
        if len(calls) == 3:
            raise CheckFailed("wrong")

    with pytest.raises(CheckFailed, match="not every time, with the same arguments: wrong"):
        draws.search(draws.SEEDS, once, 10)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_drawn_has_its_kind(kind: str) -> None:
    drawn: list[Any] = []
    draws.search(draws.SPECS[kind], drawn.append, 10)
    assert {spec.kind for spec in drawn} == {kind}
    assert len(set(drawn)) > 5


def test_a_seed_draws_the_same_and_another_one_others() -> None:
    strategy = draws.together(draws.SPECS["layer"], draws.programs())
    first, again, other = [], [], []  # type: ignore[var-annotated]
    for drawn, seed in ((first, 0), (again, 0), (other, 1)):
        draws.search(strategy, drawn.append, 10, seed)
    assert first == again != other


class Counted:
    """A subject that judges nothing."""

    def __init__(self, room: Any) -> None:
        self.pages = Pages(room, np.random.default_rng(0))

    def draw(self, rng: np.random.Generator, tokens: int) -> Any:
        return rng.standard_normal((tokens, 1))

    def feed(self, *chunks: tuple[int, Any]) -> list[Any]:
        for name, values in chunks:
            self.pages.extend(name, len(values))
        return [values for _, values in chunks]

    def judge(self, values: Any, fed: Any, what: str) -> None:
        assert np.array_equal(values[[row for f in fed for row in f.rows]][:, 0], fed_values(fed))


def fed_values(fed: Any) -> Any:
    return np.concatenate([one.result[:, 0] for one in fed])


def test_programs_do_all_that_users_do() -> None:
    done: Counter[str] = Counter()

    def run(program: Program) -> None:
        one = Run(Counted(ROOM), program)
        one.judge()
        for words in one.done:
            done[next((w for w in ("forks", "back", "ends") if w in words), "fed")] += 1

    draws.search(draws.programs(), run, 100)
    assert min(done[words] for words in ("forks", "back", "ends")) > 10, done
    assert done["fed"] > 200


def test_errors_are_measured_by_what_is_usual() -> None:
    """A row that is nearly 0 by chance may be off by what other rows may be off."""
    guarding = Guarding(CHECKS["random-calls"].promise)
    rng = np.random.default_rng(0)
    trial = Trial(ReferenceBackend(), ReferenceBackend(), rng, guarding=guarding)
    for seed in range(200):
        judge_call(trial, specs.LMHead(3, 3), [1], seed)


def test_without_hypothesis_examples_are_refused_if_they_are_asked_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examples_here() == EXAMPLES
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    check = ("backends", "check", "reference", "--only", "random-calls")
    done = cli(*check, "--examples", "5")
    done.assert_fails(
        "--examples 5: needs the package hypothesis", "pip install 'lfm2kit[testing]'"
    )
    for words in (check, (*check, "--examples", "0")):
        done = cli(*words)
        assert (done.code, "1 skipped" in done.out) == (0, True)
        assert "hypothesis is not installed" in done.out


def test_examples_leave_no_file_behind(tmp_path: Path) -> None:
    words = ("backends", "check", "reference", "--only", "random-calls", "--examples", "1")
    command = [sys.executable, "-m", "lfm2kit", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
