"""Writes answers: an engine's steps, and the texts that come of them.

Whoever waits for an answer makes steps, and each step serves all answers.  So threads and tasks
that share a writer fill its batches together, and no thread of its own is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import compress, islice
from operator import not_
from threading import Lock
from types import TracebackType
from typing import TypeVar

from lfm2kit.chat.thinking import Part
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import FAILED, Request
from lfm2kit.engine.room import described
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import HIDE, Generation
from lfm2kit.model import LFM2
from lfm2kit.transport import Transport

# Requests that have begun and not ended: more than an engine's steps have room for.
MOST_BEGUN = 256

Wanted = TypeVar("Wanted")


class Writer:
    """A writer of answers with one model and one engine.  Threads may share it.

    In a `job` of several ranks, rank 0 has it, and the others `lfm2kit.engine.steps.follow`.  Raise
    `Lfm2kitError` if the room does not fit into memory.
    """

    def __init__(
        self,
        model: LFM2,
        language: Language,
        *,
        context: int | None = None,
        sequences: int | None = None,
        job: Transport | None = None,
    ) -> None:
        self.language = language
        self.tokens = 0  # of all answers so far
        self.ended = 0  # answers so far
        self._engine = Engine(model, context=context, sequences=sequences, job=job)
        self._lock = Lock()  # of the engine and of the answers
        self._answers: dict[tuple[int, int], Answer] = {}  # that have not ended
        # What any thread may add to: requests to begin, and answers to cancel.
        self._new: deque[tuple[Request, list[Answer]]] = deque()
        self._left: deque[Answer] = deque()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._engine.__exit__(kind, error, traceback)

    @property
    def room(self) -> str:
        """Return in words what the engine has room for."""
        return described(self._engine.room)

    @property
    def context(self) -> int:
        """Return how many tokens a prompt and its answer may have together."""
        return self._engine.context

    def begin(self, request: Request, options: Generation, *, split: bool = False) -> list[Answer]:
        """Return the answers to a request, which the next steps write.

        Their parts have thoughts apart if `split` says so.  Answers fail with an `Lfm2kitError` if
        the engine has no room for a sequence of that length.
        """
        hides = options.think == HIDE
        answers = [
            Answer(
                self.language.stream(options),
                self.language.end_ids,
                self.language.thinking(request) if split or hides else None,
                hides=hides,
            )
            for _ in range(request.n)
        ]
        self._new.append((request, answers))
        return answers

    def advance(self, answer: Answer) -> list[Part]:
        """Return what an answer has that was not taken; make a step first if there is nothing.

        The list may be empty: the answer may need more steps.
        """
        with self._lock:
            taken = answer.take()
            if not taken and answer.end is None:
                self._step()
                taken = answer.take()
        self._cancel_left()
        return taken

    def step(self) -> None:
        """Make a step of all answers."""
        with self._lock:
            self._step()
        self._cancel_left()

    def leave(self, answer: Answer) -> None:
        """Cancel an answer if it goes on.

        Any thread may call this at any time, a destructor in the midst of a step included, so it
        waits for nothing: whoever has the lock cancels.
        """
        self._left.append(answer)
        self._cancel_left()

    def _step(self) -> None:
        self._begin_new()
        for event in self._engine.step():
            key = event.id, event.choice
            answer = self._answers.get(key)
            if answer is None:  # it was cancelled
                continue
            answer.add(event)
            self.tokens += event.token_id is not None
            if answer.end is not None:
                del self._answers[key]
                # A stop string may have ended it, of which the engine knows nothing.
                self._engine.cancel(*key)
                self.ended += 1

    def _begin_new(self) -> None:
        while self._new:
            request, answers = self._new.popleft()
            try:
                id = self._engine.add(request)
            except Lfm2kitError as error:
                for answer in answers:
                    answer.finish(FAILED, error)
                self.ended += len(answers)
                continue
            for choice, answer in enumerate(answers):
                answer.key = id, choice
                self._answers[answer.key] = answer

    def _cancel_left(self) -> None:
        while self._left and self._lock.acquire(blocking=False):
            try:
                self._begin_new()  # an answer may be among them
                while self._left:
                    answer = self._left.popleft()
                    if answer.key is not None and self._answers.pop(answer.key, None) is not None:
                        self._engine.cancel(*answer.key)
            finally:
                self._lock.release()


def written(
    writer: Writer,
    wanted: Iterable[Wanted],
    begin: Callable[[Wanted], list[Answer]],
    stepped: Callable[[], object] = lambda: None,
) -> Generator[tuple[Wanted, list[Answer]], None, None]:
    """Yield each of `wanted` with its whole answers, as soon as they have ended.

    `begin` returns the answers to one of them, and `stepped` is called after each step.  The next
    ones begin while others end, so the engine's steps stay full.
    """
    waiting, begun = iter(wanted), list[tuple[Wanted, list[Answer]]]()
    known = writer.ended  # answers, also of other threads
    try:
        while True:
            for one in islice(waiting, MOST_BEGUN - len(begun)):
                begun.append((one, begin(one)))
            if not begun:
                return
            writer.step()
            stepped()
            if known == writer.ended:  # as after most steps: looking at all answers takes longer
                continue
            known = writer.ended  # before the look, after which others may end
            have_ended = [_have_ended(answers) for _, answers in begun]
            ended = list(compress(begun, have_ended))
            begun = list(compress(begun, map(not_, have_ended)))
            yield from ended
    finally:
        for _, answers in begun:
            for answer in answers:
                writer.leave(answer)


def _have_ended(answers: Iterable[Answer]) -> bool:
    return all(answer.end is not None for answer in answers)
