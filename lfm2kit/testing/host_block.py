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
from lfm2kit.testing.call_log import CallLog
from lfm2kit.testing.guards import (
    GuardedTensors,
    arrays_of_arguments,
    guarded,
    guarded_batch,
    require_whole_margins,
)
from lfm2kit.testing.raw_results import overwrite, require_new, require_plain
from lfm2kit.weights import Weights


class HostBlock:
    """A block that works in `memory`; arguments are copied to it, and results back at once.

    The copies lie between margins, and so may the `weights` of which the block was built.  What was
    copied back is overwritten: no later call may show it.  Calls are noted in `log`.
    """

    def __init__(
        self,
        spec: Spec,
        block: Block,
        memory: Memory,
        weights: GuardedTensors | None = None,
        log: CallLog | None = None,
    ) -> None:
        self.block = block
        self.memory = memory
        self._spec = spec
        self._weights = weights or GuardedTensors({})
        self._log = log or CallLog()
        self._calls = 0
        self._inputs: Sequence[Any] = ()  # the newest that were moved

    def __call__(self, *inputs: Any) -> Any:
        result = self.compute(*self.to_memory(inputs))
        copy = self.to_host(result)
        overwrite(result)
        return copy

    def compute(self, *moved: Any) -> Any:
        """Return what the block does of arguments that `to_memory` returned, as it is.

        Raise `CheckFailed` if the block writes beside one of them, or of its weights, and for a
        result on the host that is not plain, or not new.
        """
        self._calls += 1
        self._log.called(self._spec, self._calls, self._inputs)
        result = self.block(*moved)
        require_whole_margins(self._weights.arrays(), str(self._spec))
        if self.memory.name == HOST.name:
            require_whole_margins(arrays_of_arguments(moved), str(self._spec))
            require_plain(result, str(self._spec))
            require_new(self._spec, result, moved)
        return result

    def new_state(self, room: Room) -> State:
        return self.block.new_state(room)  # type: ignore[attr-defined]

    def to_memory(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the arguments copied to the block's memory, but for a state, which is there.

        A state follows the batch.
        """
        self._inputs = inputs
        batches = [i for i, value in enumerate(inputs) if isinstance(value, Batch)]
        end = batches[0] + 1 if batches else len(inputs)
        return [*map(self._moved, inputs[:end]), *inputs[end:]]

    def to_host(self, result: Array | tuple[Array, ...]) -> Any:
        if isinstance(result, tuple):
            return tuple(np.array(self.memory.to_host(array)) for array in result)
        return np.array(self.memory.to_host(result))

    def _moved(self, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Batch):
            is_here = self.memory.name == HOST.name
            return guarded_batch(value) if is_here else value.on(self.memory)
        return self.memory.from_host(guarded(value))


def why_not_built(backend: Backend, spec: Spec) -> str | None:
    """Return None if `backend` builds `spec`, whole or all its parts; else the reason it gives."""
    reason = backend.why_unsupported(spec)
    if reason is None or not spec.parts():
        return reason
    return next((r for part in spec.parts() if (r := why_not_built(backend, part.spec))), None)


def host_block(
    backend: Backend,
    spec: Spec,
    weights: Weights,
    *,
    is_guarded: bool = True,
    is_skewed: bool = False,
    log: CallLog | None = None,
) -> HostBlock:
    """Return the block of `spec`, built whole or joined of its parts as the core would.

    If it is guarded, its weights are copies between margins, at aligned addresses or one element
    beyond such.  Its building and its calls, but not those of its parts, are noted in `log`.
    """
    if log is not None:
        log.built(spec)
    if backend.why_unsupported(spec) is None:
        tensors = GuardedTensors(weights, is_skewed) if is_guarded else None
        block = backend.build(spec, weights if tensors is None else Weights(tensors))
        return HostBlock(spec, block, backend.memory(spec), tensors, log)
    parts = {
        part.role: host_block(
            backend,
            part.spec,
            weights.scope(part.scope),
            is_guarded=is_guarded,
            is_skewed=is_skewed,
        )
        for part in spec.parts()
    }
    return HostBlock(spec, JOINS[type(spec)](HOST).make(spec, **parts), HOST, log=log)
