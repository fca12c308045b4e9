"""`verify` finds planted faults at the right block, in FP32 and in 16 bits."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import (
    API_VERSION,
    BF16_GRADE,
    FP16_GRADE,
    FP32,
    BackendPlugin,
    Block,
    Precision,
    Room,
)
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.errors import Lfm2kitError
from lfm2kit.reference import short_conv
from lfm2kit.reference.feed_forward import MLP, Experts
from lfm2kit.specs import Spec
from lfm2kit.testing.host_block import host_block
from lfm2kit.verifying.differences import Difference
from lfm2kit.verifying.forced import CALLS
from lfm2kit.verifying.verification import Verification, verify_against
from lfm2kit.weights import Weights
from tests.conformance import broken
from tests.conformance.broken import BrokenBackend, around
from tests.random_model import RANDOM

IDS = np.random.default_rng(5).integers(0, 1024, (3, 7), dtype=np.int32)
PRECISIONS = (FP32, Precision("fp16", FP16_GRADE), Precision("bf16", BF16_GRADE))


class Forgets(short_conv.ShortConv):
    """A convolution that takes each step for the first one."""

    def _past(self, state: Any, pages: Any, start: int) -> Any:
        return super()._past(state, pages, 0)


class WholeLayers(BrokenBackend):
    """Builds layers whole, of the blocks of another backend."""

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, specs.Layer) else super().why_unsupported(spec)

    def state_bytes(self, spec: Any, room: Room) -> int:
        return super().state_bytes(getattr(spec, "operator", spec), room)

    def build(self, spec: Spec, weights: Weights) -> Block:
        if isinstance(spec, specs.Layer):
            return host_block(BrokenBackend(self.instead), spec, weights, is_guarded=False)
        return super().build(spec, weights)


def swapped(kind: Any) -> Any:
    """Return how to build blocks whose w1 and w3 are swapped."""
    return broken.w1_w3_swapped(kind)


# Where the plan puts a backend, which of its blocks are faulty, and the block that must be named.
FAULTS: dict[str, tuple[str, Any, Any, str]] = {
    "softmax": ("3.moe", specs.Router, broken.SoftmaxRouter, "3.feed_forward.router"),
    "bias weighs": ("5.moe", specs.Router, broken.BiasInTheWeights, "5.feed_forward.router"),
    "no bias": ("7.moe", specs.Router, broken.BiasIgnored, "7.feed_forward.router"),
    "w1 and w3": ("1.mlp", specs.MLP, swapped(MLP), "1.feed_forward"),
    "w1 and w3 of experts": ("4.moe", specs.Experts, swapped(Experts), "4.feed_forward.experts"),
    "rotation": ("2.attn", specs.Attention, broken.InterleavedRope, "2.operator"),
    "norm after": ("5.attn", specs.Attention, broken.RopeBeforeNorm, "5.operator"),
    "future": ("2", specs.Attention, broken.SeesTheNextRow, "2.operator"),
    "borders": ("4", specs.ShortConv, broken.ConvLeaksOverBoundaries, "4.operator"),
    "forgetful": ("6.conv", specs.ShortConv, Forgets, "6.operator"),
    "no delta": ("7.norm", specs.RMSNorm, broken.NormDropsDelta, "7.operator_norm"),
    "raw bits": ("head", specs.LMHead, broken.RawBits, "lm_head"),
}


def setup_of(plan: str, backend: Any, **options: Any) -> Setup:
    """Return the random model with a backend called "mine" somewhere."""
    plugins = installed_plugins()
    mine = BackendPlugin(
        "mine",
        "a backend of this test",
        lambda context: backend,
        API_VERSION,
        precisions=PRECISIONS,
    )
    plugins.backends["mine"] = InstalledBackend(mine, "this test")
    return set_up(RANDOM, Options(backend=plan, **options), plugins=plugins)


def verified(plan: str, backend: Any = None, **options: Any) -> Verification:
    return verify_against(setup_of(plan, backend, **options), IDS, "reference")


# Norms before or after a rotation differ by less than bf16 rounds, with norms near 1.
TOO_FINE = ("norm after", "bf16")
CASES = [c for c in product(FAULTS, ("fp32", "fp16", "bf16")) if c != TOO_FINE]


@pytest.mark.parametrize(("fault", "precision"), CASES)
def test_a_fault_is_found_at_its_block(fault: str, precision: str) -> None:
    where, kind, build, block = FAULTS[fault]
    found = verified(f"cpu_simd,{where}=mine", BrokenBackend({kind: build}), precision=precision)
    assert found.first is not None
    name = block if block == "lm_head" else f"layers.{block}"
    assert (found.first.block, found.first.backend) == (name, "mine")
    others = [one for one in found.differences if one.backend != "mine"]
    assert all(one.is_within for one in others)  # none has another's error


def test_without_a_fault_every_block_is_within_its_grade() -> None:
    for precision in ("fp32", "bf16"):
        found = verified("cpu_simd", precision=precision)
        assert found.first is None
        calls = {call: [d.block for d in found.differences if d.call == call] for call in CALLS}
        assert len(calls["forward"]) == 36  # 8 layers of 4 blocks, and 4 around them
        assert calls["forward"] == calls["prompt"] == calls["step"] == list(found.drift)


def test_a_fault_within_a_whole_layer_is_narrowed_down_to_a_part() -> None:
    found = verified("cpu_simd,4=mine", WholeLayers({specs.Experts: swapped(Experts)}))
    assert found.first is not None
    assert (found.first.block, found.first.call) == ("layers.4", "forward")
    wrong = [part.block for part in found.parts if not part.is_within]
    assert wrong == ["layers.4.feed_forward.experts"]
    assert {part.block for part in found.parts if part.is_within} >= {"layers.4.operator"}


def test_a_fault_that_a_state_alone_shows_is_told_by_its_call() -> None:
    found = verified("cpu_simd,6.conv=mine", BrokenBackend({specs.ShortConv: Forgets}))
    assert found.first is not None
    assert found.first.call == "step"


def test_a_router_near_a_tie_may_choose_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin as wide as any gap, rows of other experts count as near ties."""
    monkeypatch.setattr("lfm2kit.verifying.near_ties.NEAR_TIE", np.inf)
    found = verified("cpu_simd,5.moe=mine", BrokenBackend({specs.Router: broken.BiasIgnored}))
    assert found.first is None
    (router,) = (
        one for one in found.worst_calls() if one.backend == "mine" and one.kind == "router"
    )
    assert router.near_ties > 0
    assert router.rows + router.near_ties == IDS.size


def test_what_the_other_side_does_not_build_is_left_alone() -> None:
    found = verify_against(setup_of("cpu_simd", None), IDS, "blas")
    assert {one.kind for one in found.differences} == {"conv", "mlp", "head"}
    assert "layers.2.operator" in found.alone


def test_an_error_of_one_block_drifts_to_those_behind_it() -> None:
    found = verified(
        "cpu_simd,2.attn=mine", BrokenBackend({specs.Attention: broken.InterleavedRope})
    )
    assert found.drift["layers.1.feed_forward"] < 1e-5 < found.drift["lm_head"]


def test_a_block_whose_only_row_is_near_a_tie_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2kit.verifying.near_ties.NEAR_TIE", np.inf)
    setup = setup_of("cpu_simd,5.moe=mine", BrokenBackend({specs.Router: broken.SoftmaxRouter}))
    found = verify_against(setup, IDS[:1, :1], "reference")
    assert found.first is None
    assert found.undecided == ["layers.5.feed_forward.router"]


def test_experts_that_add_nan_are_not_excused_by_a_tie() -> None:
    wrong = around(specs.Experts, lambda block: lambda *inputs: np.nan * block(*inputs))
    found = verified("cpu_simd,5.experts=mine", wrong)
    assert found.first is not None
    assert found.first.block == "layers.5.feed_forward.experts"


def test_a_coarser_other_side_does_not_make_the_block_wrong() -> None:
    found = verify_against(setup_of("cpu_simd", None), IDS, "int8:q8")
    assert found.first is None
    assert "layers.2.operator" in found.alone


def test_an_other_side_without_any_block_is_told_in_a_line() -> None:
    class BuildsNothing(BrokenBackend):
        def why_unsupported(self, spec: Spec) -> str | None:
            return "it builds nothing"

    setup = setup_of("cpu_simd", BuildsNothing({}))
    with pytest.raises(Lfm2kitError, match="'mine' builds no block of this model: it builds noth"):
        verify_against(setup, IDS, "mine")


@pytest.mark.parametrize(
    ("call", "rows", "row", "place"),
    [
        ("forward", 64, 17, "sample 1, token 1, column 0"),
        ("prompt", 60, 17, "sample 1, token 2, column 0"),
        ("prompt", 4, 1, "sample 1, token 14, column 0"),
        ("forward", 4, 1, "sample 1, token 15, column 0"),
        ("step", 4, 1, "sample 1, token 15, column 0"),
    ],
)
def test_a_place_is_a_token_of_a_sample(call: str, rows: int, row: int, place: str) -> None:
    one = Difference("lm_head", "head", "mine", call, 1.0, 0.1, row=row, rows=rows)
    assert one.place((4, 16)) == place
