"""Who draws the tokens, and how a backend's own sampler is judged: right ones pass here."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2kit import load_model
from lfm2kit.backend import Samples
from lfm2kit.engine.drawing import NumPySampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.samplers import sampler_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.runner import judged
from tests.conformance.samplers import Sampling

OF_SAMPLERS = [name for name in CHECKS if name.startswith("sampled-")]


def test_numpy_draws_for_a_backend_without_a_sampler() -> None:
    assert isinstance(sampler_of("reference", ReferenceBackend()), NumPySampler)


def test_a_backend_draws_its_own_tokens() -> None:
    own = NumPySampler()
    assert sampler_of("own", Sampling(own)) is own
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


def test_a_backend_that_raises_is_named() -> None:
    class Raises(ReferenceBackend):
        def sampler(self) -> Any:
            raise KeyError("no kernel")

    with pytest.raises(Lfm2kitError, match=r"^sampler of backend 'own' raised KeyError: "):
        sampler_of("own", Raises())


def test_there_are_checks_and_they_pass_a_sampler_that_is_right() -> None:
    assert len(OF_SAMPLERS) == 3
    assert [judged(name, Sampling(NumPySampler())).verdict for name in OF_SAMPLERS] == [
        "passed"
    ] * 3


def test_a_backend_without_a_sampler_is_not_judged() -> None:
    assert {judged(name, ReferenceBackend()).detail for name in OF_SAMPLERS} == {
        "it has no sampler"
    }
