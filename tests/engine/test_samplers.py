"""Who draws the tokens, and how a backend's own sampler is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lfm2kit import load_model
from lfm2kit.backend import Samples
from lfm2kit.engine.drawing import NumPySampler, Row
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.samplers import sampler_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.runner import judged

OF_SAMPLERS = [name for name in CHECKS if name.startswith("sampled-")]


class Backend(ReferenceBackend):
    """The reference with a sampler of its own."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self._sampler = sampler

    def sampler(self) -> Any:
        return self._sampler


class Writes(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        drawn = super().draw(logits, rows)
        logits -= 1
        return drawn


class Forgets(NumPySampler):
    """Forgets something that rows ask for."""

    def __init__(self, **forgotten: Any) -> None:
        self._forgotten = forgotten

    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        return super().draw(logits, [row._replace(**self._forgotten) for row in rows])


class CountsItsRows(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        return super().draw(logits, [row._replace(position=i) for i, row in enumerate(rows)])


class TakesNanForZero(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        return super().draw(np.nan_to_num(logits, nan=0, posinf=np.inf, neginf=-np.inf), rows)


def test_numpy_draws_for_a_backend_without_a_sampler() -> None:
    assert isinstance(sampler_of("reference", ReferenceBackend()), NumPySampler)


def test_a_backend_draws_its_own_tokens() -> None:
    own = NumPySampler()
    assert sampler_of("own", Backend(own)) is own
    assert isinstance(Backend(own), Samples)


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
    assert [judged(name, Backend(NumPySampler())).verdict for name in OF_SAMPLERS] == ["passed"] * 3


def test_a_backend_without_a_sampler_is_not_judged() -> None:
    assert {judged(name, ReferenceBackend()).detail for name in OF_SAMPLERS} == {
        "it has no sampler"
    }


@pytest.mark.parametrize(
    ("sampler", "caught_by"),
    [
        (Writes(), OF_SAMPLERS),
        (Forgets(mask=None), OF_SAMPLERS[:1]),
        (Forgets(forbidden=()), OF_SAMPLERS[:1]),
        (Forgets(seed=0), OF_SAMPLERS[:2]),
        (Forgets(logprobs=None), OF_SAMPLERS[:1]),
        (Forgets(prompt=np.zeros(0, np.int32)), OF_SAMPLERS[:1]),
        (Forgets(generated=np.zeros(0, np.int32)), OF_SAMPLERS[:1]),
        (CountsItsRows(), OF_SAMPLERS),
        (TakesNanForZero(), OF_SAMPLERS[:1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_checks_catch_a_sampler_that_is_wrong(sampler: Any, caught_by: list[str]) -> None:
    verdicts = {name: judged(name, Backend(sampler)).verdict for name in caught_by}
    assert set(verdicts.values()) == {"failed"}, verdicts
