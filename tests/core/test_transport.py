"""What is built on a transport's collective operations alone."""

from __future__ import annotations

import numpy as np
import pytest

from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import everyones


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_gets_what_each_gives_in_order_of_rank(ranks: int) -> None:
    def rank(transport: ThreadTransport) -> tuple[list[int], list[list[float]]]:
        number = transport.world.rank
        one = everyones(transport, number)
        assert one.dtype == np.int64
        return one.tolist(), everyones(transport, [number, 0.5]).tolist()

    expected = list(range(ranks)), [[number, 0.5] for number in range(ranks)]
    assert run_ranks(ranks, rank) == [expected] * ranks
