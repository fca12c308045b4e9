"""Whether a model's batches may end in padding rows."""

from __future__ import annotations

from collections.abc import Callable

from lfm2kit import specs
from lfm2kit.backend import Backend
from lfm2kit.building.answers import Answers
from lfm2kit.building.placement import Placed

WITH_BATCH = (specs.Embedding, specs.ShortConv, specs.Attention, specs.Layer, specs.Model)


def takes_padding(placed: Placed, create: Callable[[str], Backend]) -> bool:
    """Return whether all blocks that are called with a batch take padding rows.

    Ranks agree on the rows of a forward, a rewrite's blocks may mean others by a batch's rows, and
    a block that is crossed to, on the host, would compute these rows.
    """
    is_own = all(type(one.spec).__module__ == specs.__name__ for one in placed.tree())
    return (
        is_own
        and all(one.crosser is None for one in placed.tree())
        and not placed.offers()
        and all(
            Answers(create(leaf.backend), leaf.backend, leaf.name).takes_padding(leaf.spec)
            for leaf in placed.leaves()
            if leaf.backend is not None and isinstance(leaf.spec, WITH_BATCH)
        )
    )
