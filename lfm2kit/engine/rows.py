"""What is drawn from each row of a step's logits, and which of these tokens a sequence gets."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List

from lfm2kit.engine.drawing import Drawn, NotANumber, Row
from lfm2kit.engine.followed import Next
from lfm2kit.engine.scheduler import Chunk


def rows_of(chunk: Chunk, next: Next | None) -> list[Row | None]:
    """Return what is asked of each row of a chunk, None where nothing is drawn.

    Rows that score the prompt come first.  The last token's row follows, and those of guesses, each
    of which asks for the token after the guesses up to its own.
    """
    rows: list[Row | None] = [None] * len(chunk.to_score)
    if not chunk.is_last:
        return rows
    places = range(1 + len(chunk.guesses))
    if next is None or next.end is not None:
        return rows + [None] * len(places)
    return rows + [chunk.sequence.row(next.mask, chunk.guesses[:i]) for i in places]


def tokens_of(
    chunk: Chunk, drawn: Iterator[Drawn | NotANumber | None], rows: List[Row | None]
) -> list[Drawn | NotANumber]:
    """Return the tokens that come next in a chunk's sequence; `drawn` goes on behind its rows.

    They are what plain decoding would draw: up to the first one that was not guessed, or that ends
    the sequence.
    """
    there = [one for one in (next(drawn) for _ in rows) if one is not None]
    right = 0
    for token, guess in zip(there, chunk.guesses, strict=False):
        if isinstance(token, NotANumber) or token.token_id != guess:
            break
        right += 1
        if guess in chunk.sequence.request.stop_ids:
            return there[:right]
    return there[: right + 1]
