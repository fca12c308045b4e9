"""Replays are bounded in number and in bytes, and give the right results all the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.memory import HOST, HostMemory
from lfm2kit.replays import MOST, Key, Replays
from lfm2kit.testing.device import DeviceMemory
from tests.conformance.crossing import DeviceBackend
from tests.core.small import build, small_spec
from tests.core.test_model import Recorded, capturing_model


class Tank(HostMemory):
    """A memory with a limit of bytes, of which replays hold some; `taken` says how many."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = [0]

    def free_bytes(self) -> int:
        return self.size - self.taken[0]

    def capture(self, nbytes: int, result: object = None) -> Callable[[], Recorded]:
        def captured() -> Recorded:
            if nbytes > self.free_bytes():
                raise MemoryError
            return Recorded(lambda batch: result, nbytes, self.taken)

        return captured


def use(replays: Replays, form: object, capture: Callable[[], Recorded]) -> None:
    with replays.using(Key(None, form), capture):
        pass


def test_5000_forms_stay_within_their_bounds_and_give_their_own_results() -> None:
    tank, rng = Tank(100_000), np.random.default_rng(0)
    replays = Replays(tank)
    for i in range(20_000):
        shape = int(rng.integers(5000)) if i >= 5000 else i
        with replays.using(Key(None, shape), tank.capture(300 + shape, shape)) as replay:
            assert replay(Batch.of_sequences([])) == shape
        assert len(replays) <= MOST
        assert replays.nbytes == tank.taken[0] <= 50_000
    replays.close()
    assert tank.taken == [0]


def test_the_number_is_bounded_where_a_memory_does_not_say_what_is_free() -> None:
    held = [0]
    replays = Replays(HOST, most=3)
    for shape in range(10):
        use(replays, shape, lambda: Recorded(lambda batch: None, 10, held))
    assert (len(replays), held) == (3, [30])


def test_the_ones_used_last_are_kept() -> None:
    tank, captured = Tank(10**6), []

    def get(shape: str) -> None:
        def capture() -> Recorded:
            captured.append(shape)
            return tank.capture(10)()

        use(replays, shape, capture)

    replays = Replays(tank, most=3)
    for shape in "abcabdabc":
        get(shape)
    assert captured == ["a", "b", "c", "d", "c"]


def test_the_newest_stays_even_if_it_takes_more_than_its_share() -> None:
    tank = Tank(1000)
    replays = Replays(tank)
    use(replays, "small", tank.capture(100))
    use(replays, "large", tank.capture(800))
    assert tank.taken == [800]
    use(replays, "large", tank.capture(2000))  # it is there: nothing is captured


def test_where_there_is_no_room_all_others_are_closed_and_it_is_tried_once_more() -> None:
    tank = Tank(1000)
    replays = Replays(tank)
    for shape in range(4):
        use(replays, shape, tank.capture(100))
    use(replays, "large", tank.capture(900))
    assert tank.taken == [900]
    with pytest.raises(MemoryError):
        use(replays, "too large", tank.capture(1001))
    assert (len(replays), tank.taken) == (0, [0])


def test_a_model_keeps_few_replays() -> None:
    model, backend = capturing_model()
    plain = build(small_spec())
    for length in (*(n for n in range(1, MOST + 10) for _ in range(2)), 1, 2):
        batch = Batch.of_sequences([np.arange(length) % 50])
        expected: Any = plain.logits(batch)
        assert np.array_equal(model.logits(batch), expected)
    assert len(backend.forms) == MOST + 11  # the first two were captured again
    assert backend.held == [1000 * MOST]


def test_a_replay_in_use_is_closed_only_afterwards() -> None:
    tank = Tank(10**6)
    replays = Replays(tank, most=1)
    with replays.using(Key("model", 1), tank.capture(10, "first")) as first:
        use(replays, 2, tank.capture(20))
        assert tank.taken == [30]
        assert first(Batch.of_sequences([])) == "first"
    assert tank.taken == [20]


def test_the_replays_of_an_owner_are_dropped_with_what_is_noted_of_it() -> None:
    tank = Tank(10**6)
    replays = Replays(tank)
    for owner in ("one", "other"):
        replays.note(Key(owner, "rare"))
        with replays.using(Key(owner, "often"), tank.capture(10)):
            pass
    replays.drop("one")
    assert tank.taken == [10]
    due = [replays.is_due(Key(owner, f)) for owner in ("one", "other") for f in ("rare", "often")]
    assert due == [False, False, True, True]


def test_an_owner_that_goes_while_replays_are_at_work_is_dropped_afterwards() -> None:
    """As the garbage collector does it: in the middle of anything, even in the same thread."""
    tank = Tank(10**6)
    replays = Replays(tank)
    use(replays, 1, tank.capture(10))

    class Collecting(Recorded):
        """Asked for its size, it allocates, and the collector runs."""

        @property
        def nbytes(self) -> int:
            replays.drop("gone")
            return self._nbytes

        @nbytes.setter
        def nbytes(self, value: int) -> None:
            self._nbytes = value

    for form in range(3):
        with replays.using(
            Key("gone", form), lambda: Collecting(lambda batch: None, 10, tank.taken)
        ) as replay:
            assert replay is not None
    assert tank.taken == [10]
    assert len(replays) == 1


def test_models_of_a_memory_share_its_replays_and_the_last_one_takes_both_with_it() -> None:
    """Else the threads of a memory, and whatever it has, would stay until the process ends."""
    memory = DeviceMemory()
    one, other = (build(small_spec(), "device", {"device": DeviceBackend(memory)}) for _ in "ab")
    for model in (one, other, one, other):
        model.logits(Batch.of_sequences([[1, 2]]))
    assert one._replays is other._replays
    assert len(one._replays) == 2
    is_there = weakref.ref(memory)
    del memory, model, one
    gc.collect()
    assert len(other._replays) == 1
    del other
    gc.collect()
    assert is_there() is None
