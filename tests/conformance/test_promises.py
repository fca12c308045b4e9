"""Promises about bits: made and broken, taken back, and taken back for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import API_VERSION, Backend, BackendPlugin, Context, Promise
from lfm2kit.building.plugins import InstalledBackend, Plugins
from lfm2kit.cli import suite
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.matrix import support_matrix
from lfm2kit.testing.runner import Result, judged
from tests.checkpoint.typed import Cli
from tests.conformance import broken
from tests.conformance.broken import Around, BrokenBackend, around

REASON = "its sums have another order"


class RoundsWithAState(Around):
    """Steps have another kernel than prompts."""

    def __call__(self, x: Any, batch: Any, state: Any) -> Any:
        return self.block(x, batch, state) * np.float32(1 + 2e-7 * (state is not None))


BREACHES: dict[Promise, tuple[Backend, str]] = {
    Promise.REPEATABILITY: (around(specs.MLP, broken.RaceBetweenCalls), "repeatable"),
    Promise.BATCH_INVARIANCE: (
        around(specs.MLP, broken.PerturbedByTheNumberOfRows),
        "batch-independence",
    ),
    Promise.CHUNK_INVARIANCE: (
        around(specs.ShortConv, RoundsWithAState),
        "state-chunked-equals-one-shot",
    ),
    Promise.SPLIT_INVARIANCE: (
        BrokenBackend({specs.Experts: broken.SummedInIdOrder}),
        "experts-split-by-slot-bitwise",
    ),
}


def judge(backend: Backend, check: str, *taken_back: Promise) -> Result:
    return judged(check, backend, not_promised=dict.fromkeys(taken_back, REASON))


@pytest.mark.parametrize("promise", Promise)
def test_a_check_guards_each_promise_and_catches_its_breach(promise: Promise) -> None:
    backend, check = BREACHES[promise]
    assert CHECKS[check].promise is promise
    assert judge(backend, check).verdict == "failed"
    others = [p for p in Promise if p is not promise and p is not promise.rests_on]
    unrelated = [p for p in others if promise.why_not({p: REASON}) is None]
    assert judge(backend, check, *unrelated).verdict == "failed"


@pytest.mark.parametrize("promise", Promise)
def test_a_promise_that_is_taken_back_is_not_promised_and_judged_by_values(
    promise: Promise,
) -> None:
    backend, check = BREACHES[promise]
    result = judge(backend, check, promise)
    assert (result.verdict, result.promise, result.differs) == ("not-promised", promise.name, True)
    assert result.detail.startswith(f"{REASON}; ")
    assert "not the same bits" in result.detail
    assert not result.is_failure


@pytest.mark.parametrize("promise", [p for p in Promise if p.rests_on is not None])
def test_what_rests_on_a_promise_is_taken_back_with_it(promise: Promise) -> None:
    assert promise.rests_on is not None
    backend, check = BREACHES[promise]
    assert judge(backend, check, promise.rests_on).verdict == "not-promised"


@pytest.mark.parametrize(
    ("backend", "check"),
    [
        (BrokenBackend({specs.ShortConv: broken.ConvLeaksOverBoundaries}), "batch-independence"),
        (BrokenBackend({specs.ShortConv: broken.WindowTooShort}), "state-steps-back"),
        (BrokenBackend({specs.Experts: broken.NobodyEndsTheRow}), "experts-split-by-slot-bitwise"),
        (around(specs.MLP, broken.StaleScratch), "scratch-is-not-seen"),
        (around(specs.MLP, broken.NoRowsCrashes), "zero-rows"),
    ],
)
def test_a_fault_that_is_no_rounding_fails_whatever_is_taken_back(
    backend: Backend, check: str
) -> None:
    assert judge(backend, check, *Promise).verdict == "failed"


def test_a_check_that_guards_no_promise_passes_as_ever() -> None:
    assert judge(ReferenceBackend(), "mlp", *Promise).verdict == "passed"


def test_whoever_builds_no_such_block_is_skipped() -> None:
    class NoExperts(ReferenceBackend):
        def why_unsupported(self, spec: specs.Spec) -> str | None:
            return "none here" if isinstance(spec, specs.Experts) else super().why_unsupported(spec)

    result = judge(NoExperts(), "experts-split-by-slot-bitwise", *Promise)
    assert (result.verdict, result.detail) == ("skipped", "no experts block: none here")


def plugins_with(backend: Backend, not_promised: Mapping[Promise, str]) -> Plugins:
    plugins = Plugins([])
    plugin = BackendPlugin(
        "mine", "of a test", lambda _: backend, API_VERSION, not_promised=not_promised
    )
    plugins.backends["mine"] = InstalledBackend(plugin, "tests")
    return plugins


def test_the_command_counts_what_is_not_promised_and_ends_well(cli: Cli) -> None:
    only = "batch-independence,norm,zero-rows,mlp"
    done = cli("backends", "check", "blas", "--only", only)
    assert (done.code, "2 passed, 0 failed, 1 skipped, 1 not promised\n" in done.out) == (0, True)
    document = json.loads(cli("backends", "check", "blas", "--only", only, "--json", "-").out)
    assert (document["not_promised"], document["notes"]) == (1, [])
    assert list(document["taken_back"]) == ["BATCH_INVARIANCE"]
    (verdict,) = [r for r in document["results"] if r["promise"] is not None]
    assert (verdict["id"], verdict["verdict"]) == ("batch-independence", "not-promised")


def test_a_promise_that_holds_everywhere_could_be_made(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = plugins_with(ReferenceBackend(), {Promise.REPEATABILITY: "atomic additions"})
    for module in (suite, sys.modules["lfm2kit.cli.backends"]):
        monkeypatch.setattr(module, "installed_plugins", lambda: plugins)
    done = cli("backends", "check", "mine", "--only", "repeatable,rows-among-300")
    assert (done.code, "2 not promised" in done.out) == (0, True)
    said = f"REPEATABILITY holds in all {3 * len(CASES)} cases: it could be promised\n"
    assert said in done.out


def test_the_matrix_says_which_blocks_are_judged_in_part() -> None:
    backend, check = BREACHES[Promise.SPLIT_INVARIANCE]
    plugins = plugins_with(backend, {Promise.SPLIT_INVARIANCE: REASON})
    cells = support_matrix("mine", plugins, [Context()], [check, "mlp"])
    states = {(cell.kind, cell.width): cell[3:] for cell in cells}
    assert states["experts", "1-63"] == ("in part", "not promised: SPLIT_INVARIANCE")
    assert states["mlp", "1-63"] == ("judged", "")


def test_pytest_counts_what_is_not_promised_apart(tmp_path: Path) -> None:
    words = ("--pyargs", "lfm2kit.testing", "--lfm2kit-backend", "blas", "-k", "batch-independence")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rx", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 not promised" in done.stdout
    assert "passed" not in done.stdout
    assert "xfailed" not in done.stdout
