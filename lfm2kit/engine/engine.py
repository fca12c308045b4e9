"""The engine: requests in, events out; each step is one forward of many sequences.

    with Engine(model) as engine:
        engine.add(Request([1, 2, 3], max_tokens=8))
        while engine.is_busy:
            for event in engine.step():
                print(event.token_id, event.end)

A sequence's tokens do not depend on what else is in its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, count, repeat
from types import TracebackType

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.ahead import Ahead
from lfm2kit.engine.drawing import Drawn, NotANumber, Sampler
from lfm2kit.engine.followed import Next
from lfm2kit.engine.masks import Masks, Patience
from lfm2kit.engine.random_numbers import seed_of_fork
from lfm2kit.engine.requests import CANCELLED, FAILED, Event, Request, check_whole
from lfm2kit.engine.room import MODELS, context_of, described, most_tokens, room_for
from lfm2kit.engine.rows import rows_of, tokens_of
from lfm2kit.engine.scheduler import Chunk, Scheduler
from lfm2kit.engine.scoring import scored
from lfm2kit.engine.sequence import Sequence
from lfm2kit.engine.steps import Steps, batch_of
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.memory import Array
from lfm2kit.model import LFM2
from lfm2kit.state import Room
from lfm2kit.transport import Transport

BUDGET = 512  # tokens of a step


class Engine:
    """Sequences of one model that are made longer together.  One thread uses it.

    The state has `room`, or room for `sequences` of up to `context` tokens, or for what half of the
    free memory holds (`lfm2kit.engine.room`).  A step computes up to `budget` tokens.  The masks of
    constrained requests have `patience`.  Rank 0 of a `job` has the engine, while the others
    `lfm2kit.engine.steps.follow` it.  A step begins before the tokens of the last one are read,
    where the model and the sampler can (decision 0045).
    """

    def __init__(
        self,
        model: LFM2,
        room: Room | None = None,
        *,
        context: int | None = None,
        sequences: int | None = None,
        budget: int = BUDGET,
        sampler: Sampler | None = None,
        patience: Patience | None = None,
        job: Transport | None = None,
    ) -> None:
        check_whole("budget", budget, 1)
        self._steps = Steps(model, room or room_for(model, context, sequences), job)
        self.room = self._steps.room
        self._whole = min(context_of(model.spec), self.room.pages * self.room.page_tokens)
        self.context = min(context or self._whole, self._whole)  # tokens of a sequence, at most
        self._model = model
        self._sampler: Sampler = sampler or model.new_sampler()
        self._masks = Masks(model.spec.embed_tokens.vocab_size, patience or Patience())
        self._scheduler = Scheduler(self.room, budget)
        self._ahead = Ahead(self._steps, self._sampler, self._scheduler)
        self._live: dict[int, list[Sequence]] = {}  # sequences by the id of their request
        self._events: list[Event] = []  # that no step has returned yet
        self._ids, self._ages = count(), count()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Engine of {self._model!r}, with {described(self.room)}>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not self._steps.has_followers:
            self.close()
        else:  # the job ends with this error
            self._masks.close()

    def close(self) -> None:
        """Free the state; sequences that have not ended are lost."""
        if self._is_closed:
            return
        self._masks.close()
        self._ahead.drop()
        self._steps.close()
        self._scheduler = Scheduler(Room(0), 0)
        self._live.clear()
        self._events.clear()
        self._is_closed = True

    @property
    def is_busy(self) -> bool:
        """Return whether there are events to come."""
        return bool(self._events) or bool(self._live)

    def add(self, request: Request) -> int:
        """Return the id by which the events of a request are known; its sequences wait.

        Raise `Lfm2kitError` if its prompt, or the prompt and `max_tokens`, are too long, or if it
        has ids outside the vocabulary.
        """
        self._check_open()
        if not isinstance(request, Request):
            raise Lfm2kitError(f"an engine takes a Request; got {type(request).__name__}")
        self._check_ids("the prompt", request.ids)
        self._check_ids("stop_ids", [*request.stop_ids])
        request.sampling.check_ids(self._model.spec.embed_tokens.vocab_size)
        most = self._most_tokens(request)
        id, seed = next(self._ids), request.sampling.seed
        first, *others = self._live[id] = [
            Sequence(id, choice, next(self._ages), request, most, seed_of_fork(seed, choice))
            for choice in range(request.n)
        ]
        first.followers = others
        self._scheduler.add(first)
        return id

    def fork(self, id: int, choice: int = 0) -> int:
        """Return the id of a new request that goes on from the tokens that a sequence has now.

        It is of one sequence, with another seed, and shares the whole pages.  Raise `Lfm2kitError`
        if the sequence has ended.
        """
        self._check_open()
        origin = next((one for one in self._live.get(id, ()) if one.choice == choice), None)
        if origin is None:
            raise Lfm2kitError(f"choice {choice} of request {id} has ended, or there was none")
        fork = origin.fork(next(self._ids), next(self._ages))
        self._live[fork.id] = [fork]
        self._scheduler.add(fork)
        return fork.id

    def cancel(self, id: int, choice: int | None = None) -> None:
        """End one sequence of a request, or all, and free their pages.

        The next step returns the events.  Do nothing if they have ended.
        """
        for sequence in self._live.get(id, [])[:]:
            if choice is None or sequence.choice == choice:
                self._leave(sequence)
                self._end(sequence, CANCELLED)

    def step(self) -> list[Event]:
        """Compute the next tokens of sequences; return what there is to tell since the last step.

        If the forward fails, the sequences of the step end with its error.  If it is interrupted,
        they are put back.  The next step may have begun when this returns.
        """
        self._check_open()
        if begun := self._ahead.chunks:
            self._run_or_end(begun, self._go_on)
        else:
            self._ahead.drop()
            self._run_planned()
        events, self._events = self._events, []
        return events

    def _run_planned(self) -> None:
        """Plan a step, and run it."""
        for sequence, overdue in self._masks.overdue().items():
            self._end_constrained(sequence, overdue)
        held = self._masks.late()
        chunks = [one for one in self._scheduler.plan(held) if not self._is_misguessed(one)]
        if chunks:
            self._run_or_end(chunks, lambda: self._run(chunks))
        elif held:
            self._masks.wait()

    def _is_misguessed(self, chunk: Chunk) -> bool:
        """Return whether the guesses of a chunk's sequence were wrong, and have ended it."""
        sequence, guessing = chunk.sequence, chunk.sequence.guessing
        if guessing is None:
            return False
        guessing.check(chunk.guesses, self._model.spec.embed_tokens.vocab_size)
        if guessing.error is not None:
            self._release(sequence)
            self._end(sequence, FAILED, guessing.error)
        return guessing.error is not None

    def _run_or_end(self, chunks: Iterable[Chunk], run: Callable[[], None]) -> None:
        """Run the chunks of a step; end their sequences, or put them back, if it fails."""
        try:
            run()
        except Exception as error:
            if self._steps.has_followers:  # they are still in the midst of it
                raise
            for sequence in _running_of(chunks):
                self._fail(sequence, error)
            self._ahead.drop()
        except BaseException:
            for sequence in _running_of(chunks):
                self._scheduler.put_back(sequence)
            self._ahead.drop()
            raise

    def _go_on(self) -> None:
        """Tell the tokens of the step that has begun, while the next one is computed if it can."""
        drawn = self._ahead.read()
        told = {chunk.sequence: self._appended(chunk.sequence, [token]) for chunk, token in drawn}
        self._scheduler.advance(chunk for chunk, _ in drawn)
        for chunk, token in drawn:
            self._continue(chunk.sequence, told[chunk.sequence], token)

    def _run(self, chunks: list[Chunk]) -> None:
        if self._ahead.begin(chunks):
            self._go_on()
            return
        last = [chunk.sequence for chunk in chunks if chunk.is_last]
        self._masks.begin(chunk.sequence for chunk in chunks)
        batch = batch_of(chunks)
        sized = self._steps.sized(batch)
        with self._steps.logits(sized) as logits:
            following = self._masks.collect(last)  # while the forward still runs, where it can
            drawn = self._drawn(logits, chunks, following, sized.tokens - batch.tokens)
            scores = self._steps.scores(logits, chunks)
        told = {one: self._appended(one, tokens) for one, tokens in drawn.items()}
        late = set(last) - following.keys()
        self._scheduler.advance(
            chunk.without_last()
            if chunk.sequence in late
            else chunk.with_guessed(len(told.get(chunk.sequence, ())))
            for chunk in chunks
        )
        for one in scores:
            self._score(*one)
        for sequence, next in following.items():
            if not sequence.pages:  # its prompt could not be scored
                continue
            if sequence in drawn:
                self._continue(sequence, told[sequence], drawn[sequence][-1])
            else:
                self._end_constrained(sequence, next)

    def _drawn(
        self,
        logits: Array,
        chunks: list[Chunk],
        following: dict[Sequence, Next],
        padding: int,
    ) -> dict[Sequence, list[Drawn | NotANumber]]:
        """Return the tokens of those sequences that may have one; more if guesses are right."""
        asked = [rows_of(chunk, following.get(chunk.sequence)) for chunk in chunks]
        rows = [*chain.from_iterable(asked), *repeat(None, padding)]
        drawn = iter(self._sampler.draw(logits, rows))
        found = {}
        for chunk, its_rows in zip(chunks, asked, strict=True):
            if tokens := tokens_of(chunk, drawn, its_rows):
                found[chunk.sequence] = tokens
                chunk.sequence.told(len(chunk.guesses), len(tokens) - 1)
        return found

    def _score(self, sequence: Sequence, after: range, logits: npt.NDArray[np.float32]) -> None:
        """Tell the logprobs of the prompt's tokens that come after these positions."""
        request = sequence.request
        try:
            told = scored(request.ids, after, logits, request.prompt_logprobs or 0)
        except Lfm2kitError as error:
            self._fail(sequence, error)
            return
        sequence.scored = after.stop
        self._events.append(Event(sequence.id, sequence.choice, None, prompt=told))

    def _appended(self, sequence: Sequence, tokens: list[Drawn | NotANumber]) -> list[Event]:
        """Add tokens to their sequence, and return what is to be told of them."""
        events = []
        for token in tokens:
            if isinstance(token, NotANumber):
                break
            end, best = sequence.append(token.token_id), tuple(token.best)
            choice = sequence.choice
            events.append(Event(sequence.id, choice, token.token_id, token.logprob, best, end))
        return events

    def _continue(self, sequence: Sequence, told: list[Event], last: Drawn | NotANumber) -> None:
        """Tell the new tokens of a sequence; those that share the prompt can begin now."""
        self._events += told
        if told:
            self._release(sequence)
        if isinstance(last, NotANumber):
            self._fail(sequence, Lfm2kitError(str(last)))
        elif told[-1].end is not None:
            self._remove(sequence)

    def _end_constrained(self, sequence: Sequence, next: Next) -> None:
        """End a sequence as its constraint wants; each of the others has a text of its own."""
        assert next.end is not None
        self._release(sequence)
        self._end(sequence, next.end, next.error)

    def _release(self, sequence: Sequence) -> None:
        """Let those begin that wait for a sequence's prompt."""
        for follower in sequence.followers:
            self._scheduler.add(follower)
        sequence.followers = []

    def _leave(self, sequence: Sequence) -> None:
        """Let those that share the prompt of a sequence, and have not begun, do without it."""
        for other in self._live[sequence.id]:
            if sequence in other.followers:
                other.followers.remove(sequence)
        if sequence.followers:
            first, *first.followers = sequence.followers
            sequence.followers = []
            self._scheduler.add(first)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence, and those that share its prompt and have not begun."""
        self._scheduler.pages.forget()
        for one in (sequence, *sequence.followers):
            self._end(one, FAILED, error)

    def _end(self, sequence: Sequence, end: str, error: Exception | None = None) -> None:
        """End a sequence without another token."""
        self._events.append(Event(sequence.id, sequence.choice, None, end=end, error=error))
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Free what a sequence that has ended holds."""
        self._scheduler.drop(sequence)
        self._masks.end(sequence)
        others = self._live[sequence.id]
        others.remove(sequence)
        if not others:
            del self._live[sequence.id]

    def _most_tokens(self, request: Request) -> int:
        holder: str | Option = f"the engine's {described(self.room)}"
        if self.context < self._whole:
            holder = Option("context", self.context)
        elif self.context == context_of(self._model.spec):
            holder = MODELS
        return most_tokens(request, self.context, holder)

    def _check_ids(self, name: str, ids: npt.ArrayLike) -> None:
        size, ids = self._model.spec.embed_tokens.vocab_size, np.asarray(ids)
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise Lfm2kitError(
                f"{name}: token id {outside[0]} lies outside the vocabulary of {size}"
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise Lfm2kitError("the engine is closed; make another one")


def _running_of(chunks: Iterable[Chunk]) -> list[Sequence]:
    """Return the sequences of a step that have not ended."""
    return [chunk.sequence for chunk in chunks if chunk.sequence.pages]
