"""The twins of all blocks of a model, each made when it is first called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Backend, Block
from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from lfm2kit.testing.compare import each
from lfm2kit.testing.host_block import why_not_built
from lfm2kit.testing.kept_weights import as_kept
from lfm2kit.testing.near_ties import GapWatch
from lfm2kit.verifying import REFERENCE
from lfm2kit.verifying.near_ties import allowed_error, is_clear
from lfm2kit.verifying.twins import copied, twin, whole


class Answer(NamedTuple):
    """What a twin returned, and what may be demanded of the block beside it."""

    result: Any
    is_clear: npt.NDArray[np.bool_]  # of each row: no router is near a tie there
    allowed: float


class Twins:
    """The twins of a set-up's blocks; `against` is the plan's item that builds them.

    They have the weights with the values that the set-up's own backends keep of them.
    """

    def __init__(self, setup: Setup, against: str) -> None:
        self._setup = setup
        self._is_reference = against.partition(":")[0] == REFERENCE
        self._backend: Backend = ReferenceBackend() if self._is_reference else setup.create(against)
        self._error = 0.0 if self._is_reference else _error_of(setup, against, is_stored=True)
        self._made: dict[str, _Twin] = {}

    def why_none(self, placed: Placed) -> str | None:
        """Return why a block has no twin: the reason that the other backend gives; else None."""
        return why_not_built(self._backend, whole(placed.spec))

    def answer(self, placed: Placed, inputs: Sequence[Any], room: Room) -> Answer:
        """Return what the twin of a block returns for these arguments, which lie on the host.

        If there is a state among them, it is the block's; the twin keeps its own beside it.
        """
        if placed.name not in self._made:
            self._made[placed.name] = self._make(placed)
        made, spec = self._made[placed.name], whole(placed.spec)
        error = _error_of(self._setup, placed.backend or "") + self._error
        allowed = allowed_error(spec, error)
        result = made.call(inputs, room)
        return Answer(result, is_clear(made.watch, allowed, len(each(result)[0])), allowed)

    def weights(self, placed: Placed) -> Any:
        """Return a block's weights with the values that its backend keeps."""
        weights = self._setup.checkpoint.values.scope(placed.scope)
        assert placed.backend is not None
        return as_kept(self._setup.create(placed.backend), whole(placed.spec), weights)

    def _make(self, placed: Placed) -> _Twin:
        weights = self.weights(placed)
        watch = GapWatch(ReferenceBackend())
        judge = twin(watch, placed.name, placed.spec, weights)
        if self._is_reference:
            return _Twin(judge, None, watch, placed.spec.has_state)
        block = twin(self._backend, placed.name, placed.spec, weights)
        return _Twin(block, judge, watch, placed.spec.has_state)


class _Twin:
    """A twin, and the reference's block beside it where that is another one: it shows near ties."""

    def __init__(self, block: Block, judge: Block | None, watch: GapWatch, has_state: bool) -> None:
        self.watch = watch
        self._blocks = [block] if judge is None else [judge, block]
        self._has_state = has_state
        self._states: dict[int, tuple[Any, list[Any]]] = {}  # by the block's own, which is kept

    def call(self, inputs: Sequence[Any], room: Room) -> Any:
        self.watch.gaps.clear()
        state = inputs[-1] if self._has_state else None
        for block, its in zip(self._blocks, self._states_for(state, room), strict=True):
            others = (*inputs[:-1], its) if self._has_state else inputs
            result = block(*map(copied, others))
        return result

    def _states_for(self, state: Any, room: Room) -> list[Any]:
        if state is None:
            return [None] * len(self._blocks)
        if id(state) not in self._states:
            made = [block.new_state(room) for block in self._blocks]  # type: ignore[attr-defined]
            self._states[id(state)] = state, made
        return self._states[id(state)][1]


def _error_of(setup: Setup, item: str, *, is_stored: bool = False) -> float:
    """Return what a backend's grade allows; with its rounding, if its weights are as stored."""
    grade = setup.plugins.precision(item, setup.context.precision).grade
    return grade.block_error + (grade.rounding if is_stored else 0)
