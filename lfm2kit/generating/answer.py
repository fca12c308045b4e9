"""The text of one answer, made of an engine's events as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from lfm2kit.chat.streaming import TextStream
from lfm2kit.chat.thinking import Part, Thinking
from lfm2kit.engine.requests import STOP, Event
from lfm2kit.engine.scoring import Scored


class Answer:
    """An answer while it is generated: what nobody has taken yet, all of its text, and its end.

    The text is as the model writes it, the tags of thoughts included.  With `thinking` its parts
    come without tags, and if `hides` is true without thoughts, which `text` then lacks as well.
    The token that ends an answer has no text.
    """

    def __init__(
        self,
        stream: TextStream,
        end_ids: Iterable[int],
        thinking: Thinking | None = None,
        *,
        hides: bool = False,
    ) -> None:
        self.key: tuple[int, int] | None = None  # request and choice, once an engine has it
        self.token_ids: list[int] = []
        self.logprobs: list[Scored] = []  # of its tokens, if they are asked for
        self.prompt_logprobs: list[
            Scored
        ] = []  # of the prompt's, if it is the first of its answers
        self.end: str | None = None  # as in `Event`; None: it goes on
        self.error: Exception | None = None
        self._stream = stream
        self._end_ids = frozenset(end_ids)
        self._thinking = thinking
        self._hides = hides
        self._untaken: deque[Part] = deque()
        self._said: list[str] = []

    @property
    def text(self) -> str:
        """Return the text so far."""
        return "".join(self._said)

    @property
    def is_taken(self) -> bool:
        """Return whether it has ended, and all of it was taken."""
        return self.end is not None and not self._untaken

    def take(self) -> list[Part]:
        """Return the parts that have come since the last call."""
        return [self._untaken.popleft() for _ in range(len(self._untaken))]

    def check(self) -> None:
        """Raise the error that it failed of, if it did."""
        if self.error is not None:
            raise self.error

    def add(self, event: Event) -> None:
        """Add a token, or the end, or logprobs of the prompt."""
        self.prompt_logprobs += event.prompt
        if event.token_id is not None:
            if event.logprob is not None:
                place = len(self.token_ids)
                self.logprobs.append(Scored(place, event.token_id, event.logprob, event.best))
            self.token_ids.append(event.token_id)
            if event.token_id not in self._end_ids:
                self._show(self._stream.push([event.token_id]))
        if event.end is not None:
            self._show(self._stream.finish())
        end = event.end if self._stream.stopped is None else STOP
        if end is not None:
            self.finish(end, event.error)

    def finish(self, end: str, error: Exception | None = None) -> None:
        """End it, for a reason that an event may have."""
        if self._thinking is not None:
            self._keep(self._thinking.finish())
        self.error = error
        self.end = end  # last: other threads may look

    def _show(self, text: str) -> None:
        if not self._hides:
            self._said.append(text)
        if self._thinking is not None:
            self._keep(self._thinking.push(text))
        elif text:
            self._keep([Part(text, False)])

    def _keep(self, parts: Iterable[Part]) -> None:
        shown = [part for part in parts if not (self._hides and part.is_thought)]
        self._untaken.extend(shown)
        if self._hides:
            self._said += [part.text for part in shown]
