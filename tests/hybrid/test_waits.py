"""A profile of a hybrid model: what the device waits for the host, captured or not."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from lfm2kit_hybrid.backend import HybridBackend

from lfm2kit import specs
from lfm2kit.backend import Block, Context, Spec, Weights
from lfm2kit.batch import Batch
from lfm2kit.building.results import Checked
from lfm2kit.building.waits import Waits
from lfm2kit.profiling import forwards
from lfm2kit.profiling.forwards import Prompt, profiled
from lfm2kit.reference.backend import ReferenceBackend
from tests.conformance.crossing import DeviceBackend
from tests.core.small import build, small_spec
from tests.core.test_model import SEQUENCES

LONG = 0.05  # seconds
BATCH = Batch.of_sequences(SEQUENCES)


class ChoosesSlowly(ReferenceBackend):
    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        if not isinstance(spec, specs.Choice):
            return block

        def slow(scores: Any) -> Any:
            time.sleep(LONG)
            return block(scores)

        return slow


class FillsSlowly(ChoosesSlowly):
    """Its choices write their results where they are wanted."""

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        if isinstance(spec, specs.Choice):
            block.fill = partial(fill, block)  # type: ignore[attr-defined]
        return block


def fill(block: Block, results: Any, scores: Any) -> None:
    for target, result in zip(results, block(scores), strict=True):
        target[...] = result


@pytest.mark.parametrize("host", [ChoosesSlowly, FillsSlowly])
def test_the_device_waits_for_the_host_where_it_chooses(
    host: type[ReferenceBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwards, "MOST_OVERHEAD", np.inf)
    gpu, checked, waits = DeviceBackend(), list[Checked](), list[Waits]()
    there: dict[str, Any] = {"cuda": gpu, "cpu_simd": host()}
    hybrid = HybridBackend(Context(create_backend=there.__getitem__))
    model = build(small_spec(), "hybrid", {"hybrid": hybrid}, checked=checked, waits=waits)
    expected = build(small_spec()).logits(BATCH)
    profile = profiled(model, [*checked, *waits], Prompt(BATCH), repetitions=2)
    assert len(gpu.replays) == 2  # without marks, and with them
    for spans in profile.spans:
        waited = {span.name: span for span in spans if span.what.kind == "wait for host"}
        assert list(waited) == [
            f"layers.{layer}.feed_forward.router.choice.wait" for layer in (2, 3)
        ]
        assert all(span.seconds >= LONG / 5 for span in waited.values())
        chosen = [span for span in spans if span.memory == "host"]
        assert [f"{span.name}.wait" for span in chosen] == list(waited)
        assert all(span.seconds >= LONG for span in chosen)
    np.testing.assert_array_equal(model.logits(BATCH), expected)
