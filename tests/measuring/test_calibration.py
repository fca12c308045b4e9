"""What `calibrate` measures, wherever experts are computed; it says nothing about real times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import (
    BF16,
    F32,
    Backend,
    BackendPlugin,
    Block,
    Ceilings,
    Context,
    Format,
    Precision,
    Spec,
    Weights,
)
from lfm2kit.building import rates
from lfm2kit.building.curves import Curve
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.building.rates import Calibration, Side, read_calibration
from lfm2kit.cli.console import write_document
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring import block_times, calibration, exchange_times, together
from lfm2kit.measuring.calibration import calibrated, measurable
from lfm2kit.measuring.timing import Timing
from lfm2kit.measuring.together import Stopwatch
from lfm2kit.memory import HOST
from lfm2kit.precisions import FP32, FP32_GRADE
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import StreamedExperts
from tests.conformance.late import LateBackend
from tests.core.rounding import RoundingBackend
from tests.core.test_model import CapturingBackend, DeviceBackend, Elsewhere
from tests.random_model import RANDOM

PRECISIONS = (FP32, Precision("half", FP32_GRADE))


class Seen(ReferenceBackend):
    """The reference, with names and ceilings; it keeps what its blocks of experts are given."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        if spec.kind != "experts":
            return block

        def seen(*inputs: Any) -> Any:
            self.calls.append((spec, inputs))
            return block(*inputs)

        return seen

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return 1000 * len(spec.local_experts) if isinstance(spec, specs.Experts) else 10

    def ceilings(self) -> Ceilings:
        return Ceilings(1e12, 1e11)

    def hardware(self) -> Mapping[str, str]:
        return {"device": "an abacus"}


class Streaming(DeviceBackend):
    """A backend elsewhere that streams; it keeps what its streamed blocks are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, StreamedExperts) else super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        if not isinstance(spec, StreamedExperts):
            return super().build(spec, weights)
        block = super().build(spec.experts, weights)

        def streamed(*inputs: Any) -> Any:
            self.calls.append((spec, inputs))
            return block(*inputs)

        return streamed


class NoExperts(ReferenceBackend):
    def why_unsupported(self, spec: Spec) -> str | None:
        return "no experts" if spec.kind in ("experts", "moe") else super().why_unsupported(spec)


def setup(plan: str, **others: Backend) -> Setup:
    """Return a setup in which the reference is what would compute on the host."""
    plugins = installed_plugins()
    for name in list(plugins.backends):
        if name != "reference":
            del plugins.backends[name]
    for name, backend in others.items():
        create = _always(backend)
        plugin = BackendPlugin(name, name, create, 1, preference=1, precisions=PRECISIONS)
        plugins.backends[name] = InstalledBackend(plugin, "this test")
    return set_up(RANDOM, Options(backend=plan), plugins=plugins)


def _always(backend: Backend) -> Any:
    def create(context: Context) -> Backend:
        return backend

    return create


def by_name(measured: Calibration) -> dict[str, Side]:
    return {side.experts.backend: side for side in measured.sides}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "REPETITIONS", 1)
    monkeypatch.setattr(calibration, "ROWS", (1, 4, 16))
    monkeypatch.setattr(block_times, "ROWS", (1, 4))
    monkeypatch.setattr(exchange_times, "COPY_BYTES", 1)
    monkeypatch.setattr(calibration, "LINK_BYTES", 1 << 16)


def test_every_expert_gets_the_same_rows_and_every_token_different_experts() -> None:
    calls: list[Any] = []
    there = setup("seen", seen=Seen(calls))
    calibrated(there, measurable(there))
    given = []
    for spec, (x, ids, weights) in calls:
        rows = Counter(ids.ravel().tolist())
        assert rows.keys() == set(spec.local_experts)
        assert x.shape == (len(ids), 128)
        assert ids.shape == weights.shape == (len(ids), 4)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        given.append(set(rows.values()))
    assert [*map(sorted, given)] == [[rows] for rows in (1, 4, 16) for _ in range(2)]


def test_experts_are_as_many_as_caches_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 4 * 3 * 128 * 48
    for enough, count in [(1, 4), (5 * one, 4), (8 * one, 8), (1000 * one, 16)]:
        monkeypatch.setattr(calibration, "EXPERTS_BYTES", enough)
        (there,) = measurable(setup("reference"))  # also what computes on the host
        assert there.placed.spec.local_experts == tuple(range(count))  # type: ignore[attr-defined]


def test_the_seconds_are_of_one_expert_and_the_file_is_read_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = setup("seen", seen=Seen([]))
    monkeypatch.setattr(Stopwatch, "seconds", lambda self, *calls: 0.032)
    measured, _ = calibrated(there, measurable(there))
    side = by_name(measured)["seen"]
    assert side.experts == rates.Experts("seen", "fp32", 128, 48, "BF16")
    assert side.product == Curve((1, 4, 16), (0.002,) * 3)  # 16 experts
    assert (side.expert_bytes, side.memory, side.link) == (1000, "host", None)
    assert (side.ceilings, side.hardware) == (Ceilings(1e12, 1e11), {"device": "an abacus"})
    assert measured.model == "random"
    assert {"processor", "cores", "threads", "lfm2kit"} <= measured.machine.keys()
    write_document(tmp_path / "rates.json", measured.document())
    assert read_calibration(tmp_path / "rates.json") == measured


def test_what_a_call_takes_for_any_number_of_experts_is_found_by_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 experts take 10 ms, and 4 take 4 ms: 2 ms and 0.5 ms for each."""

    def seconds(self: Stopwatch, captures: Any, *calls: Any) -> float:
        _, ids, _ = calls[0].args
        return {16: 10e-3, 4: 4e-3}.get(len(np.unique(ids.values)), 1.0)

    monkeypatch.setattr(Stopwatch, "seconds_recorded", seconds)
    monkeypatch.setattr(calibration, "block_rates", lambda *there: [])
    there = setup("far", far=CapturingBackend())
    far = [one for one in measurable(there) if one.placed.backend == "far"]
    measured, _ = calibrated(there, far)
    (side,) = measured.sides
    assert side.call.experts == 16
    assert side.call.fixed == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("backend", "row_format"), [(Seen([]), F32), (RoundingBackend(BF16), BF16)], ids=["F32", "BF16"]
)
def test_the_format_in_which_experts_read_rows_is_kept(
    backend: Backend, row_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = setup("seen", seen=backend)
    monkeypatch.setattr(Stopwatch, "seconds", lambda self, *calls: 0.032)
    measured, _ = calibrated(there, measurable(there))
    assert by_name(measured)["seen"].row_format == row_format


@pytest.mark.parametrize("backend", [DeviceBackend(), LateBackend()])
def test_a_memory_elsewhere_has_a_link_and_the_host_is_measured_too(backend: Any) -> None:
    there = setup("far", far=backend)
    steps: list[int] = []
    measured, _ = calibrated(there, measurable(there), lambda: steps.append(1))
    near, far = by_name(measured)["reference"], by_name(measured)["far"]
    assert near.link is None
    assert far.memory == backend.memory(RANDOM.spec).name
    assert far.link is not None
    assert min(far.link) > 0
    assert far.expert_bytes == 2 * 3 * 128 * 48  # as they are stored: the backend does not say
    assert len(steps) == calibration.steps(there, measurable(there)) > 2 * (3 + 1)


@pytest.mark.parametrize("backend", [DeviceBackend(), Streaming()])
def test_the_way_to_a_device_that_streams_is_measured_by_what_it_streams(
    backend: DeviceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "seconds", lambda self, *calls: (calls[0](), 0.032)[1])
    there = setup("far", far=backend)
    measured, _ = calibrated(there, measurable(there))
    far, plain = by_name(measured)["far"], calibration.LINK_BYTES / 0.032
    assert far.link is not None
    assert far.link.to_host == pytest.approx(plain)
    if not isinstance(backend, Streaming):
        assert far.link.from_host == pytest.approx(plain)
        return
    assert far.link.from_host == pytest.approx(16 * far.expert_bytes / 0.032)
    ((spec, (x, ids, _)),) = backend.calls
    assert spec.experts.local_experts == tuple(range(16))
    assert len(spec.portions) > spec.slots > 1, "a slot is used again"
    assert sorted(ids.values.ravel().tolist()) == list(range(16)), "a row for each"
    assert len(x.values) == len(ids.values) == 4


def test_the_host_is_measured_in_the_precision_of_the_plans_item() -> None:
    """Without a backend for it there, nothing would compute these experts on the host."""
    both = {"far": DeviceBackend(), "near": ReferenceBackend()}
    assert {one.experts[:2] for one in measurable(setup("far:half", far=both["far"]))} == {
        ("far", "half")
    }
    assert {one.experts[:2] for one in measurable(setup("far:half", **both))} == {
        ("far", "half"),
        ("near", "half"),
    }


def test_a_device_is_named_by_its_memory_if_its_backend_does_not() -> None:
    class Loom(Elsewhere):
        def unit(self) -> str:
            return "the loom"

    backend = DeviceBackend()
    backend.there = Loom()
    there = setup("far", far=backend)
    measured, _ = calibrated(there, measurable(there))
    assert by_name(measured)["far"].hardware == {"device": "the loom"}
    assert by_name(measured)["reference"].hardware == {}


def test_a_call_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 2 s for one row, four are expected to take twice 8 s, to warm up and to be timed."""
    monkeypatch.setattr(Stopwatch, "_once", lambda self, call, enqueued: Timing(2.0, 1.0))
    there = setup("seen", seen=Seen([]))
    measured, waited = calibrated(there, measurable(there))
    assert by_name(measured)["seen"].product.sizes == (1,)
    assert waited == 0.5


def test_a_plan_without_experts_has_nothing_to_measure() -> None:
    dense = replace(RANDOM, spec=replace(RANDOM.spec, layers=RANDOM.spec.layers[:2]))
    there = replace(setup("reference"), checkpoint=dense)
    with pytest.raises(Lfm2kitError, match="no experts that a backend of the plan reference"):
        measurable(there)


def test_a_backend_that_builds_no_experts_is_not_asked() -> None:
    there = measurable(setup("none,experts=reference", none=NoExperts()))
    assert [one.experts.backend for one in there] == ["reference"]


def test_host_memory_is_timed_by_the_host_and_another_one_by_its_marks() -> None:
    assert Stopwatch(HOST).seconds(lambda: np.zeros(10)) > 0
    late = LateBackend().late
    with late.stream():
        done: list[int] = []
        seconds = Stopwatch(late).seconds(lambda: late.current.add(lambda: done.append(1)))
        assert seconds > 0
    assert len(done) == together.ENQUEUED + 1
