"""Compares a model's blocks with their twins, in forwards with and without a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed
from lfm2kit.building.results import Checked
from lfm2kit.errors import Lfm2kitError
from lfm2kit.verifying.differences import Difference
from lfm2kit.verifying.forced import Forced, calls, drift
from lfm2kit.verifying.narrowing import parts_that_differ
from lfm2kit.verifying.twins_of_model import Twins


@dataclass(frozen=True, slots=True)
class Verification:
    """How far each block of a model is from its twin."""

    differences: Sequence[Difference]  # of each block in each call, in order
    # By block: the distance of its last rows when the model runs by itself.
    drift: Mapping[str, float]
    parts: Sequence[Difference] = ()  # of the first block that differs
    # By block: why the other side has none, of blocks that were not compared.
    alone: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> Difference | None:
        """Return the first block that differs by more than its grade allows."""
        return next((one for one in self.differences if not one.is_within), None)

    def worst_calls(self) -> Iterator[Difference]:
        """Yield one difference for each block: that of the call in which it was largest."""
        worst: dict[str, Difference] = {}
        for one in self.differences:
            if one.block not in worst or one.error > worst[one.block].error:
                worst[one.block] = one
        yield from worst.values()

    @property
    def undecided(self) -> list[str]:
        """Return the blocks of which no row could be judged in some call, by their names."""
        return list(dict.fromkeys(one.block for one in self.differences if one.is_undecided))

    @property
    def nearest(self) -> Difference:
        """Return the block that comes nearest to what is allowed, or is farthest beyond it."""
        return max(self.differences, key=lambda one: one.error / one.allowed)


def verify_against(
    setup: Setup,
    ids: npt.NDArray[np.int32],
    against: str,
    built: Callable[[Placed], None] = lambda placed: None,
    done: Callable[[], None] = lambda: None,
) -> Verification:
    """Compare the blocks of a set-up with those of the plan's item `against`.

    `ids` are samples [n, seq_len]; `built` is called after each block is built, and `done` after
    each forward: four, or two for samples of one token and for models without a state.
    """
    checked: list[Checked] = []
    model = setup.build(built, tokens=ids.size, checked=checked)
    twins = Twins(setup, against)
    forced = Forced(model, checked, twins)
    if not forced.compared:
        why = next(iter(forced.alone.values()))
        raise Lfm2kitError(f"'{against}' builds no block of this model: {why}")
    has_state = all(rewrite.has_state for rewrite in setup.rewrites)
    forwards = calls(model, ids, has_state=has_state)
    for call in forwards:
        forced.run(call)
        done()
    drifted = drift(model, forced.compared, forwards[0], forced.wanted)
    done()
    parts = tuple(_narrowed(setup, forced, twins))
    return Verification(forced.differences, drifted, parts, forced.alone)


def _narrowed(setup: Setup, forced: Forced, twins: Twins) -> Sequence[Difference]:
    if forced.first is None:
        return ()
    placed = forced.first.checked.placed
    assert placed.backend is not None
    error = setup.plugins.precision(placed.backend, setup.context.precision).grade.block_error
    backend = setup.create(placed.backend)
    return list(parts_that_differ(backend, forced.first, twins.weights(placed), error))
