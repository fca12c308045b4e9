"""How logits change by what a sequence holds, and by the bias of a request."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lfm2kit.engine.penalties import changes, penalise
from lfm2kit.engine.sampling import Sampling

LOGITS = [2.0, -2.0, 0.0, -np.inf, 1.0]


def ids(*of: int) -> npt.NDArray[np.int32]:
    return np.array(of, np.int32)


def penalised(
    sampling: Sampling, prompt: npt.NDArray[np.int32], generated: npt.NDArray[np.int32]
) -> list[float]:
    logits = np.array(LOGITS, np.float32)
    penalise(logits, sampling, prompt, generated)
    values: list[float] = logits.tolist()
    return values


def test_nothing_asked_changes_nothing() -> None:
    assert penalised(Sampling(), ids(0, 1), ids(2)) == LOGITS
    assert not changes(Sampling(temperature=0.3, top_k=3))


def test_repetition_divides_what_is_above_0_and_multiplies_what_is_below_once() -> None:
    sampling = Sampling(repetition_penalty=2)
    assert penalised(sampling, ids(0, 0, 1), ids(0, 2, 3)) == [1, -4, 0, -np.inf, 1]


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalised(sampling, ids(4, 4), ids(0, 0, 1)) == [1, -2.75, 0, -np.inf, 1]
    assert penalised(Sampling(presence_penalty=-1), ids(), ids(2, 2)) == [2, -2, 1, -np.inf, 1]
    assert penalised(sampling, ids(4, 4), ids()) == LOGITS


def test_a_bias_is_added_and_does_not_bring_back_what_has_no_probability() -> None:
    sampling = Sampling(logit_bias={4: 100, 3: 100, 0: -100})
    assert penalised(sampling, ids(), ids()) == [-98, -2, 0, -np.inf, 101]


def test_repetition_comes_first() -> None:
    sampling = Sampling(repetition_penalty=2, presence_penalty=0.5, logit_bias={0: 1})
    assert penalised(sampling, ids(0), ids(0)) == [1.5, -2, 0, -np.inf, 1]


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {0: 0.0}},
    ],
)
def test_whatever_changes_logits_is_known_to(asked: dict[str, float]) -> None:
    assert changes(Sampling(**asked))  # type: ignore[arg-type]
