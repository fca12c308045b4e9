"""The forward pass: `Forward` is the model as prose, `LFM2` what users call.

Everything is decided in `lfm2kit.building`; nothing of it is left to the forward.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from reprlib import repr as brief  # of what a caller gives, however long it is
from threading import RLock
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakKeyDictionary, finalize

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import (
    Array,
    Backend,
    Block,
    Captures,
    Operator,
    Replay,
    Server,
    State,
    TakesIds,
)
from lfm2kit.batch import Batch, Make
from lfm2kit.batch_rules import PADDING
from lfm2kit.building import out_of_memory
from lfm2kit.building.joins import Join, Joins
from lfm2kit.building.placement import Placed
from lfm2kit.building.results import check_replay
from lfm2kit.engine.drawing import NumPySampler, Sampler
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HOST, Mark, Memory, is_ordered, own_stream
from lfm2kit.overlapped import OFF, Overlap
from lfm2kit.replays import Key, Replays, replays_in
from lfm2kit.state import ModelState, Room
from lfm2kit.transport import Exchange, ExchangeError, ExchangeOffer

if TYPE_CHECKING:
    from lfm2kit.chat.templates import Message
    from lfm2kit.generating.answer import Answer


class Forward:
    """A forward: ids -> embedding -> layers -> norm of last rows -> logits [logits, vocab_size]."""

    def __init__(self, spec: specs.Model, **blocks: Any) -> None:
        self.embed_tokens: Block = blocks["embed_tokens"]
        self.layers: list[Operator] = [blocks[f"layers.{i}"] for i in range(len(spec.layers))]
        self.last_rows: Block = blocks["last_rows"]
        self.embedding_norm: Block = blocks["embedding_norm"]
        self.lm_head: Block = blocks["lm_head"]

    def __call__(self, batch: Batch, state: Sequence[State] | None = None) -> Array:
        hidden, delta = self.embed_tokens(batch), None
        for layer, layer_state in zip(self.layers, state or repeat(None), strict=False):
            hidden, delta = layer(hidden, delta, batch, layer_state)
        hidden, delta = self.last_rows(hidden, delta, batch)
        _, x = self.embedding_norm(hidden, delta)
        return self.lm_head(x)

    def new_state(self, room: Room) -> list[State]:
        return [layer.new_state(room) for layer in self.layers]


class DecoderLayer:
    """An operator and a feed-forward, each after a norm; `delta` is not yet added to `hidden`."""

    def __init__(
        self,
        spec: specs.Layer,
        operator_norm: Block,
        operator: Operator,
        ffn_norm: Block,
        feed_forward: Block,
    ) -> None:
        self.operator_norm = operator_norm
        self.operator = operator
        self.ffn_norm = ffn_norm
        self.feed_forward = feed_forward
        self.new_state = operator.new_state

    def __call__(
        self, hidden: Array, delta: Array | None, batch: Batch, state: State
    ) -> tuple[Array, Array]:
        hidden, x = self.operator_norm(hidden, delta)
        delta = self.operator(x, batch, state)
        hidden, x = self.ffn_norm(hidden, delta)
        return hidden, self.feed_forward(x)


class RoutedExperts:
    """A sparse MoE of a router and experts that were built apart."""

    def __init__(self, spec: specs.SparseMoe, router: Block, experts: Block) -> None:
        self.router = router
        self.experts = experts

    def __call__(self, x: Array) -> Array:
        expert_ids, expert_weights = self.router(x)
        return self.experts(x, expert_ids, expert_weights)


class RoutedByScores:
    """A router of scores and a choice that were built apart."""

    def __init__(self, spec: specs.Router, scores: Block, choice: Block) -> None:
        self.scores = scores
        self.choice = choice

    def __call__(self, x: Array) -> tuple[Array, Array]:
        expert_ids, expert_weights = self.choice(self.scores(x))
        return expert_ids, expert_weights


JOINS: Joins = {
    specs.Model: partial(Join, Forward),
    specs.Layer: partial(Join, DecoderLayer),
    specs.SparseMoe: partial(Join, RoutedExperts),
    specs.Router: partial(Join, RoutedByScores),
}


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LFM2:
    """A model that is ready to run.  Ids enter and logits leave as NumPy arrays.

    Threads may share a model: their forwards run one after the other.
    """

    spec: specs.Model
    placed: Placed
    forward: Forward
    home: Memory
    backend: Backend  # the plan's default
    may_capture: bool = True
    takes_padding: bool = False  # whether its batches may end in padding rows
    servers: Sequence[Server] = ()  # of crossings: each forward runs inside their contexts
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)  # with other ranks, by block
    offers: Sequence[ExchangeOffer] = ()  # by which the exchanges were made
    overlap: Overlap = field(default_factory=lambda: Overlap(OFF))
    check_room: Callable[[Room], None] = lambda room: None  # raises if a state would not fit
    folder: Path | None = None  # of its checkpoint, where its tokenizer is
    new_sampler: Callable[[], Sampler] = NumPySampler  # makes who draws tokens from its logits
    # What the methods that generate text keep between their calls.
    kept: dict[str, Any] = field(init=False, repr=False, default_factory=dict)
    # The backend, if it can capture the model: asked once, because it takes longer than a launch.
    _captures: Captures | None = field(init=False, repr=False)
    _replays: Replays = field(init=False, repr=False)
    _ordered: tuple[Memory, ...] = field(init=False, repr=False)  # with a stream for each forward
    # Who owns replays: the model itself, or one of its states.
    _owner: Hashable = field(init=False, repr=False, default_factory=object)
    _states: WeakKeyDictionary[ModelState, Hashable] = field(
        init=False, repr=False, default_factory=WeakKeyDictionary
    )
    _makes: dict[Hashable, Make] = field(init=False, repr=False, default_factory=dict)
    # The end of the last forward in each ordered memory: it may have been left before it was over.
    _last: dict[str, Mark] = field(init=False, repr=False, default_factory=dict)
    _lock: Any = field(init=False, repr=False, default_factory=RLock)

    def __post_init__(self) -> None:
        is_captured = self.may_capture and can_capture(self.backend, self.placed)
        object.__setattr__(self, "_captures", self.backend if is_captured else None)
        object.__setattr__(self, "_replays", replays_in(self.home))
        memories = {placed.memory.name: placed.memory for placed in self.placed.tree()}
        ordered = tuple(memory for memory in memories.values() if is_ordered(memory))
        object.__setattr__(self, "_ordered", ordered)
        finalize(self, self._replays.drop, self._owner)

    @property
    def is_captured(self) -> bool:
        """Return whether a forward is captured when its form comes for the second time."""
        return self._captures is not None

    @property
    def may_be_left(self) -> bool:
        """Return whether a forward goes on by itself when the context of its logits is left.

        Servers, and other ranks, would wait for the host.
        """
        return self.is_captured and not self.servers and not self.offers

    def takes_ids(self, batch: Batch, state: ModelState) -> bool:
        """Return whether `logits_at_home` takes an array of ids in place of this host batch's."""
        if not self.may_be_left or self._makes:  # batches that are derived may hold ids as well
            return False
        return hasattr(self._replays.get(self._key(batch, state, ())), "with_ids")

    def __repr__(self) -> str:
        backends = sorted({str(leaf.backend) for leaf in self.placed.leaves()})
        return (
            f"<LFM2 of {len(self.spec.layers)} layers, vocabulary of "
            f"{self.spec.embed_tokens.vocab_size}, on {', '.join(backends)}>"
        )

    def logits(self, batch: Batch, state: ModelState | None = None) -> npt.NDArray[np.float32]:
        """Return float32 [len(batch.logits_rows), vocab_size], which belongs to the caller.

        With a `state` (see `new_state`) each sequence goes on from what its pages hold; without
        one, sequences are whole.
        Raise ValueError for an id outside the vocabulary, a position above 0 without a state, a
        state of another model, and a batch that the state cannot hold or go on from; TypeError for
        what is neither a batch nor a state.
        """
        if not isinstance(batch, Batch):
            raise TypeError(
                f"logits takes a lfm2kit.Batch, not {brief(batch)}; for sequences of token ids "
                "type logits(Batch.of_sequences([[1, 2, 3], [4, 5]]))"
            )
        with self.logits_at_home(batch, state) as logits:
            return self.home.to_host(logits)

    @contextmanager
    def logits_at_home(
        self, batch: Batch, state: ModelState | None = None, token_ids: Array | None = None
    ) -> Iterator[Array]:
        """Give what `logits` returns as an array of the memory `home`, where a sampler draws.

        The array may still be computed.  Whoever leaves the context before that, as `may_be_left`
        allows, enqueues there what reads it; the next forward comes after that.
        With `token_ids`, an array of `home`, these are the batch's ids, if `takes_ids` says so.
        They are ready in the order of the current stream, or were enqueued in the last context.
        Raise what `logits` raises.
        """
        host = batch.on(HOST)
        self._check_ids(host)
        self._check_padding(host)
        with out_of_memory.in_a_forward(self.forward, host), self._lock:
            held = host.without_padding()
            with self.running(host.tokens) as agreed:
                self._begin(held, state)
                with self._run(host, state, agreed, token_ids) as logits:
                    yield logits
            if state is not None:  # not before the servers have said that nothing has failed
                state.ledger.complete(held)

    def new_state(self, room: Room) -> ModelState:
        """Return an empty state with `room.pages` pages of `room.page_tokens` tokens.

        `Room.of_sequences(16, 4096)` has room for 16 sequences of up to 4096 tokens each.
        Raise `Lfm2kitError` if a memory has too little left for it, before any is allocated, and
        TypeError for what is not a `Room`.
        """
        if not isinstance(room, Room):
            raise TypeError(
                f"new_state takes a lfm2kit.state.Room, not {brief(room)}; for 16 sequences of up "
                "to 4096 tokens type new_state(Room.of_sequences(16, 4096))"
            )
        self.check_room(room)
        with out_of_memory.making_a_state(room):
            state = ModelState(room, self.forward.new_state(room))
        self._states[state] = owner = object()
        finalize(state, self._replays.drop, owner)
        return state

    @overload
    def generate(self, prompt: str | Sequence[Message], **options: Any) -> Iterator[str]: ...

    @overload
    def generate(self, prompt: list[str] | list[list[Message]], **options: Any) -> list[str]: ...

    def generate(self, prompt: Any, **options: Any) -> Iterator[str] | list[str]:
        """Return the text that follows a prompt, in pieces as they come.

        For a list of prompts return the whole texts in their order; these are computed together.  A
        prompt is a text, or the messages of a chat: dicts with a role and content.  The options are
        those of `lfm2kit.generating.options.Generation`: `max_tokens=100, temperature=0.7`.  Raise
        `Lfm2kitError` for wrong options or prompts, and for a model without a tokenizer.

        Threads may do this at the same time; their texts are computed together.  A text whose
        iterator is dropped is cancelled.
        """
        from lfm2kit.generating.from_python import generate

        return generate(self, prompt, options)

    def generate_async(self, prompt: str | Sequence[Message], **options: Any) -> AsyncIterator[str]:
        """Return what `generate` returns for one prompt, to be read with `async for`.

        Steps are made in threads.  A text whose task is cancelled is cancelled as well.
        """
        from lfm2kit.generating.from_python import generate_async

        return generate_async(self, prompt, options)

    def answers(
        self, prompts: str | Sequence[Message] | list[str] | list[list[Message]], **options: Any
    ) -> list[Answer]:
        """Return whole answers to prompts, or to one: texts, tokens, their ends, and logprobs.

        The prompts and options are those of `generate`; with `logprobs=5` each token has a logprob,
        and so have those of the prompt with `prompt_logprobs=5`.
        """
        from lfm2kit.generating.from_python import answers

        return answers(self, prompts, options)

    @contextmanager
    def running(self, tokens: int = 0) -> Iterator[Hashable]:
        """Give a forward of `tokens` tokens its surroundings: streams, servers, and other ranks.

        `logits` does this; only who calls `forward` needs it, and calls no `logits` inside.  Copy
        the result to the host inside as well: servers answer no trip once the context is left, and
        what they have not answered is NaN.  Other threads' forwards of this model wait meanwhile.
        The value is what the ranks that exchange tokens have settled for this forward.
        """
        with self._lock, ExitStack() as around:
            for memory in self._ordered:
                around.enter_context(self._after_the_last(memory))
            for server in self.servers:
                around.enter_context(server.serving())
            yield around.enter_context(self._exchanging(tokens))

    @contextmanager
    def _after_the_last(self, memory: Memory) -> Iterator[None]:
        """Make a stream current in which work comes after all that the last forward enqueued."""
        with own_stream(memory):
            assert is_ordered(memory)
            if (last := self._last.get(memory.name)) is not None:
                memory.wait(last)
            yield
            self._last[memory.name] = memory.mark()

    @contextmanager
    def _exchanging(self, tokens: int) -> Iterator[Hashable]:
        """Give a forward the surroundings of its exchanges; name the layer of one that fails."""
        try:
            with ExitStack() as around:
                yield tuple(around.enter_context(offer.around(tokens)) for offer in self.offers)
        except ExchangeError as error:
            failed = (name for name, one in self.exchanges.items() if error.exchange is one)
            raise Lfm2kitError(f"{next(failed, 'an exchange')}: ", *error.args) from error

    def _check_ids(self, batch: Batch) -> None:
        token_ids: npt.NDArray[np.int32] = batch.token_ids
        size = self.spec.embed_tokens.vocab_size
        if len(token_ids) and token_ids.view(np.uint32).max() >= size:  # negative ones are large
            row = int(np.argmax(token_ids.view(np.uint32) >= size))
            sequence = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
            raise ValueError(
                f"token id {token_ids[row]} in row {row}, which is of sequence {sequence}, lies "
                f"outside the vocabulary of {size}"
            )

    def _check_padding(self, batch: Batch) -> None:
        if batch.tokens and batch.positions[-1] == PADDING and not self.takes_padding:
            raise ValueError("the batch ends in padding rows, which the model's blocks do not take")

    def _begin(self, host: Batch, state: ModelState | None) -> None:
        """Raise ValueError or TypeError if the batch cannot go on from the state, or from none."""
        if state is not None:
            self._check_state(state)
            state.ledger.begin(host)
        elif (starts := host.starts).any():
            row = int(np.flatnonzero(starts)[0])
            raise ValueError(
                f"sequence {row} starts at position {starts[row]}, but there is no state"
            )

    def _check_state(self, state: ModelState) -> None:
        if not isinstance(state, ModelState):
            raise TypeError(f"a state is what new_state(room) returns, not {brief(state)}")
        if state not in self._states:
            raise ValueError(
                "the state belongs to another model, or is a copy: give what new_state returned"
            )
        if len(state.layers) != len(self.spec.layers):
            raise ValueError(
                f"the state has {len(state.layers)} layers, the model {len(self.spec.layers)}"
            )

    @contextmanager
    def _run(
        self,
        batch: Batch,
        state: ModelState | None,
        agreed: Hashable,
        token_ids: Array | None = None,
    ) -> Iterator[Array]:
        """Give the logits of a host batch: by a replay, if a batch of its form has run before."""
        layers = None if state is None else state.layers
        if self._captures is None:
            yield self.forward(batch.on(self.home), layers)
            return
        batch = self._with_own_views(batch)
        key = self._key(batch, state, agreed)
        if not self._replays.is_due(key):
            yield self.forward(batch.on(self.home), layers)
            self._makes.update(batch.makes)
            self._replays.note(self._key(batch, state, agreed))
            return

        def step(batch: Batch) -> Array:
            return self.forward(batch, layers)

        with self._replays.using(key, partial(self._captured, step, batch)) as replay:
            if token_ids is None:
                yield replay(batch)
            else:
                assert isinstance(replay, TakesIds), "see takes_ids"
                yield replay.with_ids(batch, token_ids)

    def _captured(self, step: Callable[[Batch], Array], batch: Batch) -> Replay:
        """Return the backend's replay of a step; `Lfm2kitError` if it returns something else."""
        assert self._captures is not None, "only such a model is captured"
        replay = self._captures.capture(step, batch)
        check_replay(self._captures, replay)
        return replay

    def _with_own_views(self, batch: Batch) -> Batch:
        """Return the host batch with the derived ones of this model's forwards, in their order.

        Another model may have derived others from the same batch.
        """
        if self._makes or batch.makes:
            batch = batch.unchecked()
            for key, make in self._makes.items():
                batch.derived(key, make)
        return batch

    def _key(self, batch: Batch, state: ModelState | None, agreed: Hashable) -> Key:
        """Return what a replay for this host batch must have been captured for."""
        owner = self._owner if state is None else self._states[state]
        forms = [one.form for one in batch.family()]
        return Key(owner, (tuple(batch.makes), tuple(forms), agreed))


def can_capture(backend: Backend, placed: Placed) -> bool:
    """Return whether a forward of `placed` can be captured by the plan's default backend."""
    return isinstance(backend, Captures) and placed.is_capturable
