"""Sound backends unlike the reference: in another memory, of larger blocks.  They must pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import HOST, Backend, Batch, Block, Memory, Room, Spec, Weights
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.host_block import host_block
from lfm2kit.testing.runner import judged
from tests.core.test_model import Recorded


class Box:
    """An array that NumPy cannot read."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values
        self.shape = values.shape


class BoxMemory:
    name = "boxes"

    def from_host(self, array: Any) -> Box:
        assert isinstance(array, np.ndarray)
        return Box(array.copy())

    def to_host(self, array: Any) -> Any:
        assert isinstance(array, Box)
        return array.values.copy()


class BoxBlock:
    """A block of the reference that takes and returns boxes."""

    def __init__(self, block: Any) -> None:
        self.block = block
        if hasattr(block, "new_state"):
            self.new_state = block.new_state

    def __call__(self, *inputs: Any) -> Any:
        result = self.block(*map(_unboxed, inputs))
        return tuple(map(Box, result)) if isinstance(result, tuple) else Box(result)


def _unboxed(value: Any) -> Any:
    if isinstance(value, Batch):
        assert value.memory.name == "boxes"
        assert isinstance(value.positions, Box)
        return value.on(HOST)
    assert not isinstance(value, np.ndarray) or value.dtype == np.float64, "a host array"
    return value.values if isinstance(value, Box) else value


class BoxBackend(ReferenceBackend):
    def memory(self, spec: Spec) -> Memory:
        return BoxMemory()

    def build(self, spec: Spec, weights: Weights) -> Block:
        return BoxBlock(super().build(spec, weights))


class CapturingBackend(ReferenceBackend):
    def capture(self, forward: Any, batch: Batch) -> Recorded:
        return Recorded(forward, 8, [0])


class BuildsOnly:
    """A backend of the reference's parts as one block, for specs of these types alone."""

    def __init__(self, *kinds: type[Spec]) -> None:
        self.kinds = kinds

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, self.kinds) else "too small"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        return host_block(ReferenceBackend(), spec, weights)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        operator = spec.operator if isinstance(spec, specs.Layer) else spec
        return ReferenceBackend().state_bytes(operator, room)


OTHERS: dict[str, Backend] = {
    "another memory": BoxBackend(),
    "whole layers": BuildsOnly(specs.Layer),
    "whole MoEs": BuildsOnly(specs.SparseMoe),
    "the whole model": BuildsOnly(specs.Model),
    "norms and layers": BuildsOnly(specs.RMSNorm, specs.Layer),
    "nothing": BuildsOnly(),
}


def test_no_check_of_models_fails_if_they_are_captured() -> None:
    """The others call blocks, which are the reference's."""
    names = [name for name in CHECKS if name.startswith(("whole-model", "captured"))]
    verdicts = {name: judged(name, CapturingBackend()).verdict for name in names}
    assert verdicts == dict.fromkeys(names, "passed")
    assert {"captured-forward", "captured-steps"} < set(names)


# What lives in another memory is judged each time in test_order.py, by a memory that works late.
LONG = {"another memory": pytest.mark.long}


@pytest.mark.parametrize(
    "other", [pytest.param(name, id=name, marks=LONG.get(name, ())) for name in OTHERS]
)
def test_no_check_fails(other: str) -> None:
    results = {name: judged(name, OTHERS[other]) for name in CHECKS}
    assert [r for r in results.values() if r.verdict not in ("passed", "skipped")] == []
    whole_models = [r.verdict for name, r in results.items() if name.startswith("whole-model")]
    assert whole_models == ["skipped" if other == "nothing" else "passed"] * 3
