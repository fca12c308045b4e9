"""Who draws the tokens, and how a backend's own sampler is judged: right ones pass here."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2kit import load_model
from lfm2kit.backend import API_VERSION, BackendPlugin, Samples
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.engine.drawing import NumPySampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.engine.samplers import sampler_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HOST
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.device import DeviceArray, DeviceMemory
from lfm2kit.testing.runner import judged
from tests.conformance.crossing import DeviceBackend
from tests.conformance.samplers import Sampling
from tests.engine.harness import generated
from tests.random_model import RANDOM, build_random

OF_SAMPLERS = [name for name in CHECKS if name.startswith("sampled-")]


def test_numpy_draws_for_a_backend_without_a_sampler() -> None:
    assert isinstance(sampler_of("reference", ReferenceBackend(), HOST), NumPySampler)


def test_a_backend_draws_its_own_tokens() -> None:
    own = NumPySampler()
    assert sampler_of("own", Sampling(own), HOST) is own
    assert isinstance(Sampling(own), Samples)


@pytest.mark.parametrize(
    ("backend", "sampler"),
    [("reference", NumPySampler), ("cpu_simd,head=reference", NumPySampler)],
)
def test_the_backend_of_the_head_draws(backend: str, sampler: type) -> None:
    engine = Engine(load_model("tiny", backend=backend), context=64, sequences=1)
    assert type(engine._sampler) is sampler


def test_the_compiled_sampler_draws_where_its_backend_has_the_head() -> None:
    model = load_model("tiny", backend="reference,head=cpu_simd")
    assert type(model.new_sampler()).__module__.startswith("lfm2kit_cpu_simd")


def test_tokens_are_drawn_from_the_array_of_another_memory() -> None:
    memory, seen = DeviceMemory(), set[type]()

    class Recorded(NumPySampler):
        def draw(self, logits: Any, rows: Any) -> Any:
            seen.add(type(logits))
            return super().draw(logits, rows)

    class Draws(DeviceBackend):
        def sampler(self) -> Any:
            return Recorded(memory)

    plugins = installed_plugins()
    plugin = BackendPlugin("device", "a device", lambda context: Draws(memory), API_VERSION)
    plugins.backends["device"] = InstalledBackend(plugin, "this test")
    model = set_up(RANDOM, Options(backend="device"), plugins=plugins).build()
    request = Request([1, 2, 3], max_tokens=4)
    with Engine(model, context=64, sequences=1) as engine:
        tokens = generated(engine, request)
    with Engine(build_random("reference"), context=64, sequences=1) as engine:
        assert tokens == generated(engine, request)
    assert seen == {DeviceArray}


def test_a_backend_that_raises_is_named() -> None:
    class Raises(ReferenceBackend):
        def sampler(self) -> Any:
            raise KeyError("no kernel")

    with pytest.raises(Lfm2kitError, match=r"^sampler of backend 'own' raised KeyError: "):
        sampler_of("own", Raises(), HOST)


def test_there_are_checks_and_they_pass_a_sampler_that_is_right() -> None:
    assert len(OF_SAMPLERS) == 3
    assert [judged(name, Sampling(NumPySampler())).verdict for name in OF_SAMPLERS] == [
        "passed"
    ] * 3


def test_a_backend_without_a_sampler_is_not_judged() -> None:
    assert {judged(name, ReferenceBackend()).detail for name in OF_SAMPLERS} == {
        "it has no sampler"
    }
