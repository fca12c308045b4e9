"""What `lfm2kit run --warmup` runs before the clock starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from lfm2kit.backend import Block, Spec, Weights
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.cli.performing import _warm_up
from lfm2kit.measuring.running import run_samples
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import LMHead
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.core.test_model import CapturingBackend
from tests.random_model import RANDOM
from tests.ranks.test_exchanging import plugins_with

INPUTS = np.arange(96, dtype=np.int32).reshape(12, 8)


def prepared(batch_size: int) -> Any:
    return SimpleNamespace(inputs=INPUTS, batch_size=batch_size, recorder=None)


def test_a_forward_that_is_captured_is_captured_before_the_clock_starts() -> None:
    backend = CapturingBackend()
    plugins = plugins_with(backend, "warming_up")
    model = set_up(RANDOM, Options(backend="reaching"), plugins=plugins).build()
    _warm_up(model, prepared(4), None)
    assert len(backend.forms) == 1
    run_samples(model, INPUTS, 4)
    assert len(backend.forms) == 1


def test_every_rank_warms_up_with_as_many_samples_as_its_forwards_will_have() -> None:
    class Seen(ReferenceBackend):
        def __init__(self) -> None:
            self.rows: list[int] = []

        def build(self, spec: Spec, weights: Weights) -> Block:
            block: Any = super().build(spec, weights)
            if not isinstance(spec, LMHead):
                return block
            return lambda x: self.rows.append(len(x)) or block(x)

    def rank(transport: ThreadTransport) -> list[int]:
        backend = Seen()
        plugins = plugins_with(backend, f"seen_{transport.world.rank}")
        options = Options(backend="reaching")
        model = set_up(RANDOM, options, plugins=plugins, transport=transport).build()
        _warm_up(model, prepared(4), transport)
        return backend.rows

    assert run_ranks(2, rank) == [[4], [4]]
