"""A block that is called with host arrays, whatever memory it works in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lfm2kit.backend import Array, Backend, Block, Room, State
from lfm2kit.batch import Batch
from lfm2kit.memory import HOST, Memory
from lfm2kit.model import JOINS
from lfm2kit.specs import Spec
from lfm2kit.weights import Weights


class HostBlock:
    """A block that works in `memory`; arguments are copied to it, and results back at once."""

    def __init__(self, spec: Spec, block: Block, memory: Memory) -> None:
        self.block = block
        self.memory = memory
        self._has_state = spec.has_state

    def __call__(self, *inputs: Any) -> Any:
        return self.to_host(self.block(*self.to_memory(inputs)))

    def new_state(self, room: Room) -> State:
        return self.block.new_state(room)  # type: ignore[attr-defined]

    def to_memory(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the arguments copied to the block's memory; a state is already there."""
        moved, state = (inputs[:-1], inputs[-1:]) if self._has_state else (inputs, ())
        return [*map(self._moved, moved), *state]

    def to_host(self, result: Array | tuple[Array, ...]) -> Any:
        if isinstance(result, tuple):
            return tuple(np.array(self.memory.to_host(array)) for array in result)
        return np.array(self.memory.to_host(result))

    def _moved(self, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Batch):
            return value.on(self.memory)
        return self.memory.from_host(value.copy())


def why_not_built(backend: Backend, spec: Spec) -> str | None:
    """Return None if `backend` builds `spec`, whole or all its parts; else the reason it gives."""
    reason = backend.why_unsupported(spec)
    if reason is None or not spec.parts():
        return reason
    return next((r for part in spec.parts() if (r := why_not_built(backend, part.spec))), None)


def host_block(backend: Backend, spec: Spec, weights: Weights) -> HostBlock:
    """Return the block of `spec`, built whole or joined of its parts as the core would."""
    if backend.why_unsupported(spec) is None:
        return HostBlock(spec, backend.build(spec, weights), backend.memory(spec))
    parts = {
        part.role: host_block(backend, part.spec, weights.scope(part.scope))
        for part in spec.parts()
    }
    return HostBlock(spec, JOINS[type(spec)](HOST).make(spec, **parts), HOST)
