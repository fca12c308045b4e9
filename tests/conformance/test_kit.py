"""The kit as its users meet it: verdicts, expected failures, the pytest plugin from elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lfm2kit.testing
from lfm2kit import specs
from lfm2kit.backend import API_VERSION, Backend, BackendPlugin, Block, Context, Spec, Weights
from lfm2kit.building.plugins import InstalledBackend, Plugins, installed_plugins
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32
from lfm2kit.precisions import BF16_GRADE, FP16_GRADE, FP32, FP32_GRADE, Grade, Precision
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS, random_weights
from lfm2kit.testing.cases import CASES, WIDTHS, widened
from lfm2kit.testing.compare import assert_close, assert_same
from lfm2kit.testing.guards import MARGIN, GuardedTensors, guarded, require_whole_margins
from lfm2kit.testing.host_block import why_not_built
from lfm2kit.testing.near_ties import selection_gaps
from lfm2kit.testing.random_weights import stored_as
from lfm2kit.testing.runner import Result, judged, run_checks
from lfm2kit.testing.selection import selected
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed
from tests.conformance import broken
from tests.conformance.broken import BrokenBackend
from tests.conformance.each_check import each_check
from tests.conformance.rounded import RoundedBackend, SilentlyRounded

HALF = Precision("fp16", FP16_GRADE)


def plugins_with(backend: Backend) -> Plugins:
    plugins = Plugins([])
    plugin = BackendPlugin("mine", "a backend of this test", lambda _: backend, API_VERSION)
    plugins.backends["mine"] = InstalledBackend(plugin, "tests")
    return plugins


def run(backend: Backend, *only: str, expected: Mapping[str, str] | None = None) -> list[Result]:
    return run_checks("mine", plugins_with(backend), Context(), only, expected_failures=expected)


SWAPPED = BrokenBackend({specs.MLP: broken.w1_w3_swapped(broken.feed_forward.MLP)})


def test_the_runner_tells_passed_failed_and_expected_apart() -> None:
    backend, reason = SWAPPED, {"mlp": "issue 12", "lm-head": "issue 13"}
    verdicts = {r.id: r.verdict for r in run(backend, "mlp", "lm-head", "norm", expected=reason)}
    assert verdicts == {"mlp": "expected-failure", "lm-head": "unexpected-pass", "norm": "passed"}
    (failed,) = run(backend, "mlp")
    assert failed.verdict == "failed"
    assert failed.is_failure
    assert "MLP(hidden_size=24, intermediate_size=40)" in failed.detail
    assert "max abs error" in failed.detail
    assert "want" in failed.detail


def test_whatever_a_backend_raises_is_a_verdict_of_one_line() -> None:
    def raises(spec: specs.Spec, weights: Any) -> Any:
        raise RuntimeError("out of\nregisters")

    (result,) = run(BrokenBackend({specs.MLP: raises}), "mlp")
    assert (result.verdict, result.detail) == ("failed", "RuntimeError: out of")


def test_a_backend_of_one_block_passes_with_skips() -> None:
    class OneBlock(ReferenceBackend):
        def why_unsupported(self, spec: specs.Spec) -> str | None:
            return None if isinstance(spec, specs.Router) else "it routes only"

    results = run(OneBlock(), *CHECKS)
    assert {result.verdict for result in results} == {"passed", "skipped"}
    by_id = {result.id: result for result in results}
    assert by_id["mlp"].detail == "no mlp block: it routes only"
    assert by_id["router"].verdict == "passed"
    assert by_id["whole-model"].verdict == "passed"


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (specs.MLP, "rows-among-100000"),
        (specs.Embedding, "rows-among-100000"),
        (specs.ShortConv, "state-positions-beyond-32768"),
    ],
)
def test_a_check_of_several_kinds_judges_the_only_one_that_is_built(
    kind: type[Spec], check: str
) -> None:
    class OneKind(ReferenceBackend):
        def why_unsupported(self, spec: Spec) -> str | None:
            return None if isinstance(spec, kind) else "it builds one kind"

    assert judged(check, OneKind()).verdict == "passed"


@pytest.mark.long
def test_a_backend_of_wide_kernels_is_judged_by_every_check() -> None:
    verdicts = {name: judged(name, broken.MultiplesOf256({}), FP32).verdict for name in CHECKS}
    assert set(verdicts.values()) == {"passed", "skipped"}
    skipped = [name for name, verdict in verdicts.items() if verdict == "skipped"]
    of_all_widths = [
        name for name in skipped if judged(name, BrokenBackend({}), FP32).verdict == "skipped"
    ]
    assert skipped == of_all_widths


@pytest.mark.parametrize("width", WIDTHS)
def test_widened_specs_have_no_other_widths(width: int) -> None:
    for spec in (spec for kind in CASES.values() for spec in kind):
        wide = widened(spec, width)
        assert type(wide) is type(spec)
        assert why_not_built(broken.MultiplesOf256({}), wide) is None


def test_a_backend_of_wide_kernels_is_judged_by_its_own_widths() -> None:
    unaware = broken.MultiplesOf256({specs.ShortConv: broken.ConvStateNotReset})
    (result,) = run(unaware, "state-fresh-at-position-zero")
    assert result.verdict == "failed"
    assert "ShortConv(hidden_size=256" in result.detail


def test_results_come_while_the_checks_run() -> None:
    seen: list[Result] = []
    results = run_checks(
        "mine", plugins_with(ReferenceBackend()), Context(), ["norm", "mlp"], done=seen.append
    )
    assert seen == results
    assert [result.id for result in results] == ["norm", "mlp"]


def test_an_unknown_check_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(Lfm2kitError, match="Did you mean 'router-ties'"):
        selected(["router-tie"])
    with pytest.raises(Lfm2kitError, match="unknown check 'mpl'"):
        lfm2kit.testing.parametrize_backend_checks("reference", {"mpl": "a typo"})


def test_16_bit_precisions_get_a_looser_tolerance() -> None:
    fp32, half = (Trial(ReferenceBackend(), None, None, p) for p in (FP32, HALF))  # type: ignore[arg-type]
    assert fp32.tolerance < half.tolerance < 0.1
    assert fp32.near_tie < half.near_tie


def test_rounding_to_16_bits_passes_in_a_16_bit_precision_only() -> None:
    backend = BrokenBackend({specs.RMSNorm: broken.NormIn16Bits, specs.LMHead: broken.HeadIn16Bits})
    for name in ("norm", "lm-head", "layer"):
        assert judged(name, backend).verdict == "failed"
        assert judged(name, backend, HALF).verdict == "passed"


def test_kernels_are_judged_apart_from_the_rounding_that_a_backend_tells() -> None:
    exact = Precision("bf16", Grade("exact kernels", FP32_GRADE.block_error, "top-1", 1.0, 1e-4))
    for name in ("mlp", "experts", "lm-head", "layer", "whole-model", "rounded-weights"):
        assert judged(name, RoundedBackend(BF16), exact).verdict == "passed"
    assert judged("mlp", SilentlyRounded(BF16), exact).verdict == "failed"


def test_the_grade_of_fp16_tells_its_rounding_from_that_of_bf16() -> None:
    bf16 = Precision("bf16", BF16_GRADE)
    for name in ("mlp", "short-conv", "experts", "layer"):
        assert judged(name, SilentlyRounded(F16), HALF).verdict == "passed"
        assert judged(name, SilentlyRounded(BF16), HALF).verdict == "failed"
        assert judged(name, SilentlyRounded(BF16), bf16).verdict == "passed"


def test_rounding_is_judged_by_the_mean_square_error_of_the_grade() -> None:
    for limit, verdict in ((1e-4, "passed"), (1e-7, "failed")):
        grade = Grade("exact kernels", FP32_GRADE.block_error, "top-1", block_nmse=limit)
        result = judged("rounded-weights", RoundedBackend(BF16), Precision("bf16", grade))
        assert result.verdict == verdict
    assert "the normalised mean square error is" in result.detail
    assert "allowed is 1e-07" in result.detail


def test_the_router_is_judged_in_fp32_at_every_precision() -> None:
    backend = BrokenBackend({specs.Router: broken.Bf16Logits})
    assert judged("router-is-float32", backend, HALF).verdict == "failed"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.001])
def test_comparison_refuses_one_bad_value(value: float) -> None:
    want = np.ones((3, 4), np.float32)
    got = want.copy()
    got[2, 1] = value
    for compare in (
        lambda: assert_close(got, want, 1e-5, "x"),
        lambda: assert_same(got, want, "x"),
    ):
        with pytest.raises(CheckFailed, match=r"at \[2, 1\]"):
            compare()


def test_comparison_refuses_another_shape() -> None:
    with pytest.raises(CheckFailed, match="shape"):
        assert_close(np.ones((1, 4)), np.ones((3, 4)), 1.0, "x")
    with pytest.raises(CheckFailed, match="returned 2 arrays, expected 1"):
        assert_same((np.ones(1), np.ones(1)), np.ones(1), "x")


def test_a_guarded_array_lies_between_margins_of_nan() -> None:
    array = guarded(np.arange(6, dtype=np.float32).reshape(2, 3))
    around = array.base[: MARGIN + 24 + MARGIN].view(np.float32)
    assert np.array_equal(array, [[0, 1, 2], [3, 4, 5]])
    assert np.isnan(around[[*range(16), *range(-16, 0)]]).all()
    require_whole_margins([("x", array)], "a block")
    for index, side in ((15, "before"), (22, "behind")):
        was, around[index] = around[index], 0
        with pytest.raises(CheckFailed, match=f"just {side} x"):
            require_whole_margins([("x", array)], "a block")
        around[index] = was


@pytest.mark.parametrize(("format", "size"), [(F32, 4), (BF16, 2), (F16, 2)])
def test_skewed_weights_lie_at_a_multiple_of_their_elements_alone(format: Any, size: int) -> None:
    weights = stored_as(random_weights(specs.MLP(24, 40), 0), format)
    for is_skewed in (False, True):
        tensor = GuardedTensors(weights, is_skewed)["w1.weight"]
        assert tensor.data.ctypes.data % 16 == size * is_skewed
        assert not tensor.data.flags.writeable
        assert np.array_equal(tensor.data, weights["w1.weight"].data)


def test_random_weights_hide_nothing() -> None:
    """A bias that matters, w3 unlike w1, taps unlike each other; read-only, as a memory map."""
    router = specs.Router(24, 32, 4, True, True, 1.0)
    weights = random_weights(router, 0)
    assert weights.float32("expert_bias").std() > 0.1
    assert not weights["gate.weight"].data.flags.writeable
    mlp = random_weights(specs.MLP(64, 64), 0)
    assert mlp.float32("w1.weight").std() > 1.3 * mlp.float32("w3.weight").std()
    conv = random_weights(specs.ShortConv(64, 3, bias=True), 0)
    taps = conv.float32("conv.weight")[:, 0].std(axis=0)
    assert taps[2] > 1.5 * taps[0]
    assert all(conv.float32(name).std() > 0.1 for name in conv if name.endswith("bias"))


def test_weights_stored_in_16_bits_are_rounded_to_nearest() -> None:
    weights = random_weights(specs.Router(24, 5, 3, True, True, 1.0), 3)
    exact = weights.float32("gate.weight")
    for format, bits in ((BF16, 8), (F16, 11)):
        stored = stored_as(weights, format)
        assert stored["gate.weight"].format == format
        assert stored["expert_bias"].format == F32
        error = np.abs(stored.float32("gate.weight") - exact)
        assert np.all(error <= np.abs(exact) * 2.0**-bits + 2.0**-25)


def test_gaps_are_those_of_the_scores() -> None:
    spec = specs.Router(2, 3, 1, False, True, 1.0)
    weights = lfm2kit.testing.random_weights(spec, 0)
    x = np.eye(2, dtype=np.float32)
    scores = np.sort(1 / (1 + np.exp(-weights.float32("gate.weight").T)), axis=1)
    np.testing.assert_allclose(selection_gaps(spec, weights, x), scores[:, 2] - scores[:, 1], 1e-5)


def pytest_elsewhere(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


PLUGIN = ("--pyargs", "lfm2kit.testing")


def test_the_suite_runs_without_code_from_an_empty_folder(tmp_path: Path) -> None:
    code, output = pytest_elsewhere(
        tmp_path, *PLUGIN, "--lfm2kit-backend", "reference", "-k", "router", "-v"
    )
    assert code == 0, output
    assert "lfm2kit backend on trial: reference" in output
    assert "test_backend[router-ties] PASSED" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "which backend?"),
        (("--lfm2kit-backend", "referense"), "Did you mean 'reference'?"),
        (("--lfm2kit-backend", "reference", "--lfm2kit-precision", "fp7"), "has no precision fp7"),
        (
            ("--lfm2kit-backend", "reference", "--lfm2kit-expected-failures", "none.toml"),
            "none.toml: not a readable TOML file",
        ),
    ],
)
def test_a_wrong_command_is_told_so(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    code, output = pytest_elsewhere(tmp_path, *PLUGIN, *arguments)
    assert code != 0
    assert says in output
    assert "Traceback" not in output


def test_expected_failures_are_strict(tmp_path: Path) -> None:
    (tmp_path / "expected.toml").write_text('mlp = "issue 12"\n', encoding="utf-8")
    arguments = ("--lfm2kit-backend", "reference", "-k", "mlp or norm")
    code, output = pytest_elsewhere(
        tmp_path, *PLUGIN, *arguments, "--lfm2kit-expected-failures", "expected.toml"
    )
    assert code == 1
    assert "[XPASS(strict)] issue 12" in output


def test_a_plugin_writes_two_lines(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import lfm2kit.testing\n\n"
        "@lfm2kit.testing.parametrize_backend_checks('reference')\n"
        "def test_conformance(check):\n    check()\n",
        encoding="utf-8",
    )
    code, output = pytest_elsewhere(tmp_path, "-k", "norm", "-v")
    assert code == 0, output
    assert "test_conformance[norm] PASSED" in output


def test_the_kit_needs_pytest_for_tests_only() -> None:
    """`lfm2kit backends check` runs where pytest is not installed."""
    code = "import sys; sys.modules['pytest'] = None; import lfm2kit.testing.runner"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_installed_backend_can_be_asked_for_by_name() -> None:
    ready = [n for n, b in installed_plugins().backends.items() if b.why_not is None]
    assert "reference" in ready


class BF16Values(ReferenceBackend):
    """The reference, but it refuses matrices that BF16 does not hold, as fp32x3 does."""

    def build(self, spec: Spec, weights: Weights) -> Block:
        if not isinstance(spec, specs.Router | specs.Scores):
            for name, shape in spec.parameters().items():
                values = weights.float32(name)
                if len(shape) == 2 and np.any(weights[name].stored_as(BF16).float32() != values):
                    raise Lfm2kitError(f"BF16 does not hold {name}")
        return super().build(spec, weights)


@pytest.mark.parametrize("name", list(each_check()))
def test_fp32x3_is_given_weights_that_bf16_holds(name: str) -> None:
    result = judged(name, BF16Values(), Precision("fp32x3", FP32_GRADE, BF16))
    assert result.verdict in ("passed", "skipped"), result.detail
