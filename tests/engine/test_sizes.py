"""Steps of decoding are captured in few sizes: the rows beyond the sequences are padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import PADDING, Batch, Spec
from lfm2kit.engine.drawing import NumPySampler
from lfm2kit.engine.requests import Request
from lfm2kit.engine.sizes import size_for
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from lfm2kit.testing import random_weights
from lfm2kit.testing.tiny_model import build_tiny_model
from tests.conformance.ahead import DeviceSampler
from tests.conformance.crossing import DeviceBackend
from tests.engine.harness import SPEC, VOCABULARY, engine_of, model_of, run, tokens_of

SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]


def test_a_size_is_the_least_one_that_holds_the_rows() -> None:
    for rows in range(1, 129):
        assert size_for(rows) == next(size for size in SIZES if size >= rows)


class TakesNoPadding(DeviceBackend):
    def takes_padding(self, spec: Spec) -> bool:
        return not spec.has_state


def device_model(backend: DeviceBackend) -> LFM2:
    return build_tiny_model(SPEC, random_weights(SPEC, 0), ReferenceBackend(), backend)


def joining_and_leaving() -> list[Request]:
    """Return requests of which one more runs in every third step, up to 16, until they end."""
    rng = np.random.default_rng(0)
    lengths = range(60, 44, -1)
    return [Request(rng.integers(VOCABULARY, size=2), max_tokens=n) for n in lengths]


def tokens_in_turn(model: LFM2, sampler: Any) -> list[list[int]]:
    with engine_of(model, 16, sampler=sampler) as engine:
        events, ids = [], []
        for request in joining_and_leaving():
            ids.append(engine.add(request))
            for _ in range(3):
                events += engine.step()
        events += run(engine)
        return [tokens_of(events, id) for id in ids]


def test_sequences_that_join_and_leave_capture_few_forms() -> None:
    backend = DeviceBackend()
    sampler = DeviceSampler(backend.device, NumPySampler())
    tokens = tokens_in_turn(device_model(backend), sampler)
    assert tokens == tokens_in_turn(model_of(), NumPySampler())
    steps = [replay for replay in backend.replays if replay.form.max_seqlen == 1]
    assert sorted(replay.form.sequences for replay in steps) == [1, 2, 4, 8, 16]


def test_blocks_that_do_not_take_padding_get_none() -> None:
    backend = TakesNoPadding()
    model = device_model(backend)
    assert not model.takes_padding
    tokens = tokens_in_turn(model, DeviceSampler(backend.device, NumPySampler()))
    assert tokens == tokens_in_turn(model_of(), NumPySampler())
    assert len({replay.form.sequences for replay in backend.replays}) > 5
    with pytest.raises(ValueError, match="ends in padding rows, which the model's blocks do not"):
        model.logits(Batch.of_sequences([[1]]).padded(2))


def test_an_answer_that_is_no_bool_is_an_error() -> None:
    class Maybe(DeviceBackend):
        def takes_padding(self, spec: Spec) -> Any:
            return "perhaps"

    with pytest.raises(
        Lfm2kitError, match=r"takes_padding of backend .* must return True or False"
    ):
        device_model(Maybe())


@pytest.mark.parametrize("sequences", range(1, 18))
def test_padding_changes_no_bit_of_other_rows(sequences: int) -> None:
    model = model_of()
    rng = np.random.default_rng(sequences)
    pages = [[i] for i in range(sequences)]
    prompts = [rng.integers(VOCABULARY, size=3) for _ in pages]
    plain, padded = (model.new_state(Room(sequences, 64)) for _ in range(2))
    for state in (plain, padded):
        model.logits(Batch.of_sequences(prompts, pages=pages), state)
    for start in (3, 4):
        ids = rng.integers(VOCABULARY, size=(sequences, 1))
        step = Batch.of_sequences([*ids], starts=[start] * sequences, pages=pages)
        rounded_up = step.padded(size_for(sequences))
        want, got = model.logits(step, plain), model.logits(rounded_up, padded)
        assert (rounded_up.positions[sequences:] == PADDING).all()
        np.testing.assert_array_equal(got[:sequences], want, strict=True)
        assert np.isfinite(got).all()
