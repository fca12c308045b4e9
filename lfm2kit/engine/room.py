"""Sizes the state of an engine: by what is asked, or by what is free."""

from __future__ import annotations

from bisect import bisect_left

from lfm2kit import specs
from lfm2kit.batch_rules import MOST_CONTEXT
from lfm2kit.engine.requests import Request, check_whole
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.model import LFM2
from lfm2kit.state import MOST_TOKENS, Room

SEQUENCES = 16  # of the whole context, at most, where nobody asks for a number
SHARE = 2  # one part of what is free for the state, the others for what forwards need
MODELS = "the model's context"

NO_ROOM = Room(0)
MOST_PAGES = MOST_TOKENS // NO_ROOM.page_tokens


class TooLongError(Lfm2kitError):
    """A refusal of a prompt that leaves no room for an answer."""


def room_for(model: LFM2, context: int | None = None, sequences: int | None = None) -> Room:
    """Return room for `sequences` sequences of up to `context` tokens each.

    Without both numbers it is what half of the free memory holds, and at most as much as 16
    sequences of the model's context need.  Raise `Lfm2kitError` if the context is longer than the
    model's.
    """
    for name, value in (("context", context), ("sequences", sequences)):
        if value is not None:
            check_whole(name, value, 1)
    most = context_of(model.spec)
    check_context(context, most)
    of_one = NO_ROOM.pages_of(context or most)
    if context is not None and sequences is not None:
        if sequences * of_one > MOST_PAGES:
            few = MOST_PAGES // of_one
            raise Lfm2kitError(
                Option("sequences", sequences),
                f": a state has room for up to {few} sequences of {context} tokens",
            )
        return Room(sequences * of_one)
    least = 1 if context is None else of_one
    return Room(max(least, _fitting(model, (sequences or SEQUENCES) * of_one)))


def check_context(context: int | None, most: int) -> None:
    """Raise `Lfm2kitError` for a context that is longer than a model's, which has `most` tokens."""
    if context is not None and context > most:
        raise Lfm2kitError(
            Option("context", context),
            f": the model's context has {most} tokens; give at most that",
        )


def context_of(spec: specs.Model) -> int:
    """Return how many tokens a sequence of this model may have."""
    return min(spec.max_position_embeddings or MOST_CONTEXT, MOST_CONTEXT)


def most_tokens(request: Request, context: int, holder: str | Option = MODELS) -> int:
    """Return how many tokens each sequence of a request may have, its prompt included.

    Raise `TooLongError` if it needs more than the `context` of `holder`.
    """
    prompt, least = len(request.ids), request.max_tokens or max(request.min_tokens, 1)
    if prompt + least <= context:
        return min(prompt + (wanted_tokens(request) or context), context)
    advice: list[str | Option] = [f"a prompt may have up to {context - 1}"]
    if prompt < context:
        name = "min_tokens" if request.max_tokens is None else "max_tokens"
        advice = [Option(name), f" may be up to {context - prompt}"]
    raise TooLongError(
        f"a prompt of {prompt} tokens and {least} more do not fit into the {context} "
        "tokens that a sequence may have (",
        holder,
        "); ",
        *advice,
    )


def wanted_tokens(request: Request) -> int | None:
    """Return how many tokens each sequence has if the context leaves them; None: all that it does.

    The prompt is not counted.
    """
    if request.max_tokens is not None or request.usual_tokens is None:
        return request.max_tokens
    return max(request.usual_tokens, request.min_tokens)


def described(room: Room) -> str:
    """Return a room in words."""
    tokens = room.pages * room.page_tokens
    pages = "1 page" if room.pages == 1 else f"{room.pages} pages"
    return f"{pages} of {room.page_tokens} tokens, for {tokens} tokens of all sequences"


def _fitting(model: LFM2, most: int) -> int:
    """Return how many pages fit into one part in `SHARE` of what is free, up to `most`."""
    most = min(most, MOST_PAGES // SHARE)
    return bisect_left(range(1, most + 1), True, key=lambda pages: not _fits(model, pages))


def _fits(model: LFM2, pages: int) -> bool:
    try:
        model.check_room(Room(SHARE * pages))
    except Lfm2kitError:
        return False
    return True
