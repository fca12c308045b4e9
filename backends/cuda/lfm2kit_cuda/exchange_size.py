"""How large a mailbox of the exchange between GPUs is; needs no CuPy."""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit.transport import Traffic
from lfm2kit_cuda.constants import EXCHANGE

WORD = 4


class Size(NamedTuple):
    """What mailboxes have room for."""

    tokens: int  # of each rank
    k: int  # experts of a token
    hidden_size: int
    element: int  # bytes of one of a row; products have float32

    @classmethod
    def of(cls, traffic: Traffic, tokens: int = 0) -> Size:
        """Return the size for a layer's traffic."""
        element = traffic.row_format.block_bytes
        return cls(tokens, traffic.num_experts_per_tok, traffic.hidden_size, element)

    def covering(self, other: Size) -> Size:
        """Return the smallest size that both fit in."""
        return Size(*map(max, self, other))

    def nbytes(self, ranks: int) -> int:
        """Return the bytes of a mailbox, as exchange.cu lays it out."""
        lines = 2 * EXCHANGE.MOST_RANKS * EXCHANGE.LINE
        products = self.k * self.tokens * self.hidden_size
        rows = ranks * self.tokens * self.hidden_size
        headers = 2 * ranks * self.tokens * self.k
        return WORD * (lines + products + headers) + self.element * rows

    def scratch_bytes(self, ranks: int) -> int:
        """Return the bytes of a mailbox, of the rows that are handed out, and of their products."""
        rows, row = ranks * self.tokens * self.k, self.element * self.hidden_size
        return self.nbytes(ranks) + rows * (row + WORD * self.hidden_size + 2 * WORD)
