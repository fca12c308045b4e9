"""Memory that runs out is a sentence: which block or layer, how many bytes, what to change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.errors import Lfm2kitError
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from tests.random_model import RANDOM


def out_of_memory(*arguments: Any, **options: Any) -> Any:
    return np.empty(2**61, np.uint8)


def test_memory_that_runs_out_while_building_names_the_block_and_the_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ReferenceBackend, "build", out_of_memory)
    with pytest.raises(Lfm2kitError) as told:
        set_up(RANDOM, Options(backend="reference")).build()
    assert "to build embed_tokens, whose weights take 262 kB" in str(told.value)
    assert "Unable to allocate 2.00 EiB" in str(told.value)


@pytest.mark.parametrize("said", ["", "Unable to allocate 5 TiB"])
def test_memory_that_runs_out_in_a_forward_names_the_layer_and_the_tokens(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    model = set_up(RANDOM, Options(backend="reference")).build()

    def fails(*arguments: Any) -> Any:
        raise MemoryError(said)

    monkeypatch.setattr(model.forward.layers[3], "feed_forward", fails)
    with pytest.raises(Lfm2kitError, match=r"for 5 tokens at once in layers\.3") as told:
        model.logits(Batch.of_sequences([[1, 2, 3], [4, 5]]))
    assert (f"({said})" if said else "layers.3;") in str(told.value)


def test_memory_that_runs_out_while_a_state_is_made_names_its_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = set_up(RANDOM, Options(backend="reference")).build()
    monkeypatch.setattr(type(model.forward), "new_state", out_of_memory)
    with pytest.raises(Lfm2kitError, match=r"for a state of 7 pages \(Unable .*; try fewer seq"):
        model.new_state(Room(7))
