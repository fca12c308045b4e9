"""A seam moves arrays and batches to its block's memory and back, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import HOST, Batch, Room
from lfm2kit.seam import Seam
from tests.conformance.late import LateMemory
from tests.core.test_model import Box, Elsewhere

X = np.arange(6, dtype=np.float32).reshape(3, 2)
ROOM = Room(4, 64)


class Doubling:
    """A block of another memory that remembers what it was given."""

    def __init__(self) -> None:
        self.given: tuple[Any, ...] = ()

    def __call__(self, *inputs: Any) -> Any:
        self.given = inputs
        return Box(inputs[0].values * 2)


class Operator(Doubling):
    """A doubling block with a state."""

    def new_state(self, room: Room) -> Any:
        return ("state of", room)


@pytest.fixture
def there() -> Elsewhere:
    return Elsewhere()


def seam(block: Any, there: Elsewhere) -> Seam:
    return Seam(block, there, HOST, state_of=block)


def test_arrays_cross_once_each_way(there: Elsewhere) -> None:
    block = Doubling()
    result = seam(block, there)(X, X)
    np.testing.assert_array_equal(result, X * 2)
    assert all(isinstance(array, Box) for array in block.given)
    assert there.crossings == 3  # two arrays in, one out


def test_a_delta_that_is_not_there_stays_none(there: Elsewhere) -> None:
    block = Doubling()
    seam(block, there)(X, None)
    assert block.given[1] is None


def test_every_array_of_a_tuple_comes_back(there: Elsewhere) -> None:
    both = seam(lambda x: (x, Box(x.values + 1)), there)(X)
    assert isinstance(both, tuple)
    np.testing.assert_array_equal(both, (X, X + 1))


def test_a_batch_arrives_in_the_blocks_memory_and_is_copied_once(there: Elsewhere) -> None:
    block = Doubling()
    batch = Batch.of_sequences([[1, 2, 3]])
    call = seam(block, there)
    call(X, batch)
    first = block.given[1]
    assert first.memory is there
    call(X, batch)
    assert block.given[1] is first


def test_an_operators_state_is_never_moved(there: Elsewhere) -> None:
    block = Operator()
    state = np.zeros(3, np.float32)
    seam(block, there)(X, Batch.of_sequences([[1, 2, 3]]), state)
    assert block.given[-1] is state


def test_within_one_memory_everything_is_handed_over_as_it_is(there: Elsewhere) -> None:
    result = Box(X)
    same = Seam(lambda *inputs: (inputs, result), there, there, state_of=None)
    inputs = (Box(X), None, Batch.of_sequences([[1]]))
    handed, returned = same(*inputs)
    assert all(a is b for a, b in zip(handed, inputs, strict=True))
    assert returned is result
    assert there.crossings == 0


def test_memories_are_the_same_if_their_names_are() -> None:
    one, other = Elsewhere(), Elsewhere()
    box = Box(X)
    assert Seam(lambda x: x, one, other, state_of=None)(box) is box


def test_a_wrapped_operator_keeps_its_new_state(there: Elsewhere) -> None:
    block = Operator()

    def wrapper(*inputs: Any) -> Any:
        return block(*inputs)

    wrapped = Seam(wrapper, there, HOST, state_of=block)
    assert wrapped.new_state(ROOM) == ("state of", ROOM)
    wrapped(X, Batch.of_sequences([[1, 2, 3]]), "state")
    assert block.given[-1] == "state"


def test_only_operators_have_a_state(there: Elsewhere) -> None:
    plain = seam(Doubling(), there)
    with pytest.raises(AssertionError, match="only operators have a state"):
        plain.new_state(ROOM)


class Watched(LateMemory):
    """A memory that lists when copies to the host are begun and awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def start_to_host(self, array: Any) -> Any:
        self.log.append("begun")
        arriving = super().start_to_host(array)

        def wait() -> Any:
            self.log.append("awaited")
            return arriving.wait()

        return SimpleNamespace(wait=wait)


def test_all_copies_are_begun_before_one_is_awaited() -> None:
    def block(x: Any, y: Any) -> Any:
        return x + y, x - y

    memory = Watched()
    arrays = [memory.from_host(np.full((2, 3), i, np.float32)) for i in (3, 1)]
    results = Seam(block, HOST, memory, state_of=block)(*arrays)
    assert memory.log == ["begun", "begun", "awaited", "awaited"]
    assert [memory.to_host(result)[0, 0] for result in results] == [4, 2]
