"""A gate or a bias that no router can work with is refused by name, whatever the backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import Spec, Weights
from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Choice, Router, Scores
from tests.core.small import build, small_spec
from tests.core.test_model import FusingBackend
from tests.random_model import RANDOM

GATE, BIAS = "layers.3.feed_forward.gate.weight", "layers.3.feed_forward.expert_bias"
INF, NAN = np.inf, np.nan


def setup(backend: str) -> Setup:
    return set_up(RANDOM, Options(backend=backend))


def with_values(name: str, places: Any, value: float, backend: str = "reference") -> Setup:
    """Return the embedded model with other values at some places of one tensor."""
    made = setup(backend)
    weights = made.checkpoint.weights
    values = weights.float32(name).copy()
    values[places] = value
    tensors = {**weights, name: replace(weights[name], format=F32, data=values)}
    return replace(made, checkpoint=replace(made.checkpoint, weights=Weights(tensors)))


@pytest.mark.parametrize("backend", ["reference", "cpu_simd"])
@pytest.mark.parametrize(
    ("name", "places", "value", "says"),
    [
        (GATE, (5, 3), NAN, r"has nan at \[5, 3\] \(1 of .*must be finite"),
        (GATE, (0, 0), INF, r"has inf at \[0, 0\]"),
        (GATE, (1, 2), -INF, r"has -inf at \[1, 2\]"),
        (BIAS, 5, NAN, r"has nan at \[5\]"),
        (BIAS, slice(None), NAN, r"has nan at \[0\] \((\d+) of \1 values are wrong"),
        (BIAS, 2, INF, r"has inf at \[2\].*or -inf for an expert that is never taken"),
        (
            BIAS,
            slice(1, None),
            -INF,
            r"1 of \d+ biases are finite, but each token takes \d experts",
        ),
    ],
)
def test_a_router_of_such_values_is_refused_by_name(
    name: str, places: Any, value: float, says: str, backend: str
) -> None:
    with pytest.raises(Lfm2kitError, match=f"tensor '{name}'.*{says}"):
        with_values(name, places, value, backend).build()


@pytest.mark.parametrize("backend", ["reference", "cpu_simd"])
def test_a_masked_expert_is_legal(backend: str) -> None:
    model = with_values(BIAS, slice(0, 3), -INF, backend).build()
    assert np.isfinite(model.logits(Batch.of_sequences([[1, 2, 3]]))).all()


@pytest.mark.parametrize("whole", [specs.SparseMoe, specs.Layer, specs.Model])
def test_a_router_inside_a_larger_block_is_checked(
    whole: type[Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Spec] = []
    for part in (Scores, Choice):
        monkeypatch.setattr(part, "check_values", lambda spec, weights: checked.append(spec))
    build(small_spec(), "fusing", {"fusing": FusingBackend(whole, lambda: None)})
    assert [type(spec) for spec in checked] == 2 * [Scores, Choice]


def test_without_a_bias_none_is_asked_for() -> None:
    spec = Router(4, 3, 2, False, True, 1.0)
    spec.check_values(Weights.of_arrays({"gate.weight": np.ones((3, 4))}))
    ReferenceBackend().build(spec, Weights.of_arrays({"gate.weight": np.ones((3, 4))}))


@pytest.mark.parametrize("backend", ["reference", "cpu_simd"])
def test_a_spoilt_weight_reaches_the_logits_of_its_samples_alone(backend: str) -> None:
    """NaN in the embedding of one id: every logit of the samples with it, no bit of the others."""
    samples = [[1, 2, 3], [1, 7, 3], [4, 5]]
    clean = setup(backend).build().logits(Batch.of_sequences(samples)).copy()
    model = with_values("embed_tokens.weight", (7, 0), NAN, backend).build()
    logits = model.logits(Batch.of_sequences(samples))
    others = np.delete(np.arange(logits.shape[1]), 7)  # embeddings are tied: 7's logit is NaN
    assert np.isnan(logits[1]).all()
    assert np.array_equal(logits[[0, 2]][:, others], clean[[0, 2]][:, others])
