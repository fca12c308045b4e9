"""How large a mailbox of the exchange between GPUs is; needs no CuPy."""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit_cuda.constants import EXCHANGE

WORD = 4


class Size(NamedTuple):
    """What mailboxes have room for."""

    tokens: int  # of each rank
    k: int  # experts of a token
    hidden_size: int

    def covering(self, other: Size) -> Size:
        """Return the smallest size that both fit in."""
        return Size(*map(max, self, other))

    def nbytes(self, ranks: int) -> int:
        """Return the bytes of a mailbox, as exchange.cu lays it out."""
        lines = 2 * EXCHANGE.MOST_RANKS * EXCHANGE.LINE
        rows = (ranks + self.k) * self.tokens * self.hidden_size  # of tokens, and of products
        return WORD * (lines + rows + 2 * ranks * self.tokens * self.k)

    def scratch_bytes(self, ranks: int) -> int:
        """Return the bytes of a mailbox, of the rows that are handed out, and of their products."""
        rows = ranks * self.tokens * self.k
        return self.nbytes(ranks) + WORD * rows * (2 * self.hidden_size + 2)
