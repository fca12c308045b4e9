"""The forward pass, and the building of it: from placed specs and weights to ready blocks.

`Forward` is the model as prose.  `build_model` is where everything is decided; nothing of it is
left to the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from lfm2kit import out_of_memory, specs
from lfm2kit.backend import Array, Backend, Block, Captures, Operator, Replay, State
from lfm2kit.batch import Batch
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HOST, Memory
from lfm2kit.model_state import ModelState, room
from lfm2kit.placement import Join, Joins, Placed
from lfm2kit.progress import longest, step
from lfm2kit.replays import Replays
from lfm2kit.seam import Seam
from lfm2kit.specs import Spec, Work
from lfm2kit.trim import TrimmedLayer, TrimmedModel
from lfm2kit.weights import Weights


class Forward:
    """ids -> embedding -> layers -> norm of the last rows -> logits [logits, vocab_size]."""

    def __init__(self, spec: specs.Model | TrimmedModel, **blocks: Any) -> None:
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

    def new_state(self, slots: int, max_tokens: int) -> list[State]:
        return [layer.new_state(slots, max_tokens) for layer in self.layers]

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return sum(layer.state_bytes(slots, max_tokens) for layer in self.layers)


class TrimmedForward(Forward):
    """The forward of whole sequences whose last layer gives the last rows alone."""

    def __init__(self, spec: TrimmedModel, **blocks: Any) -> None:
        super().__init__(spec, last_rows=lambda hidden, delta, batch: (hidden, delta), **blocks)

    def new_state(self, slots: int, max_tokens: int) -> list[State]:
        raise Lfm2kitError("a trimmed model has no state: later tokens need the rows it leaves out")

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return 0


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
        self.state_bytes = operator.state_bytes

    def __call__(
        self, hidden: Array, delta: Array | None, batch: Batch, state: State
    ) -> tuple[Array, Array]:
        hidden, x = self.operator_norm(hidden, delta)
        delta = self.operator(x, batch, state)
        hidden, x = self.ffn_norm(hidden, delta)
        return hidden, self.feed_forward(x)


class TrimmedDecoderLayer:
    """A decoder layer that leaves out rows between its operator and its feed-forward."""

    def __init__(
        self,
        spec: TrimmedLayer,
        operator_norm: Block,
        operator: Operator,
        last_rows: Block,
        ffn_norm: Block,
        feed_forward: Block,
    ) -> None:
        self.reach = spec.reach_in, spec.reach_out
        self.operator_norm = operator_norm
        self.operator = operator
        self.last_rows = last_rows
        self.ffn_norm = ffn_norm
        self.feed_forward = feed_forward

    def __call__(
        self, hidden: Array, delta: Array | None, batch: Batch, state: None
    ) -> tuple[Array, Array]:
        assert state is None, "a trimmed model has no state"
        rows = batch.trimmed(*self.reach)
        hidden, x = self.operator_norm(hidden, delta)
        delta = self.operator(x, rows, None)
        hidden, delta = self.last_rows(hidden, delta, rows)
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


JOINS: Joins = {
    specs.Model: Join(Forward),
    specs.Layer: Join(DecoderLayer),
    specs.SparseMoe: Join(RoutedExperts),
    TrimmedModel: Join(TrimmedForward),
    TrimmedLayer: Join(TrimmedDecoderLayer),
}


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes the blocks of a placed model."""

    weights: Weights
    create: Callable[[str], Backend]
    joins: Joins = field(default_factory=lambda: JOINS)
    wrap: Callable[[str, Spec, Block], Block] = lambda name, spec, block: block
    built: Callable[[Placed], None] = lambda placed: None  # called after each leaf: progress
    before: Callable[[Placed], None] = lambda placed: None  # called before each leaf
    may_capture: bool = True  # False: a wrapper works in calls alone

    def build(self, placed: Placed) -> Any:
        """The block of `placed`, ready to be called from the memory around it."""
        if placed.backend is None:
            blocks = {role: self.build(part) for role, part in placed.parts}
            block = self.joins[type(placed.spec)].make(placed.spec, **blocks)
        else:
            self.before(placed)
            weights = self.weights.scope(placed.scope)
            step(f"building {placed.name}", longest(Work(0, 4 * placed.spec.weight_elements())))
            placed.spec.check_values(weights)
            with out_of_memory.building(placed, weights):
                block = self.create(placed.backend).build(placed.spec, weights)
            self.built(placed)
        return self._seamed(placed, block)

    def _seamed(self, placed: Placed, block: Block) -> Block:
        wrapped = self.wrap(placed.name, placed.spec, block)
        if wrapped is block and not placed.is_copied:
            return block
        return Seam(wrapped, placed.memory, placed.outer, state_of=block)


@dataclass(frozen=True, slots=True)
class LFM2:
    """A model that is ready to run.  Ids enter and logits leave as NumPy arrays."""

    spec: specs.Model | TrimmedModel
    placed: Placed
    forward: Forward
    home: Memory
    backend: Backend  # the plan's default
    may_capture: bool = True
    _replays: Replays = field(init=False, repr=False)
    _states: WeakSet[ModelState] = field(init=False, repr=False, default_factory=WeakSet)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_replays", Replays(self.home))

    @out_of_memory.in_a_forward
    def logits(self, batch: Batch, state: ModelState | None = None) -> npt.NDArray[np.float32]:
        """float32 [len(batch.logits_rows), vocab_size].

        With a `state` (see `new_state`) each sequence goes on from what its slot has seen; without
        one, sequences are whole.
        The array is the model's own until the next call: copy it to keep it.
        Raises ValueError for an id outside the vocabulary, a position above 0 without a state, a
        state of another model, and a batch that the state cannot hold or go on from.
        """
        host = batch.on(HOST)
        self._check_ids(host.token_ids)
        if state is None:
            if host.starts.any():
                raise ValueError("a sequence starts at a position above 0, but there is no state")
            if self._is_capturable:
                return self.home.to_host(self._replay(host)(host))
            return self.home.to_host(self.forward(batch.on(self.home)))
        self._check_state(state)
        state.check(host)
        state.forget(host)
        logits = self.home.to_host(self.forward(batch.on(self.home), state.layers))
        state.advance(host)
        return logits

    def new_state(self, slots: int, max_tokens: int) -> ModelState:
        """Room for `slots` sequences of up to `max_tokens` tokens each.

        Raises ValueError where one of them is not a whole number of 0 or more.
        """
        slots, max_tokens = room("slots", slots), room("max_tokens", max_tokens)
        state = ModelState(slots, max_tokens, self.forward.new_state(slots, max_tokens))
        self._states.add(state)
        return state

    def _check_ids(self, token_ids: npt.NDArray[np.int32]) -> None:
        size = self.spec.embed_tokens.vocab_size
        if len(token_ids) and token_ids.view(np.uint32).max() >= size:  # negative ones are large
            raise ValueError(f"a token id lies outside the vocabulary of {size}")

    def _check_state(self, state: ModelState) -> None:
        if state not in self._states:
            raise ValueError(
                "the state belongs to another model, or is a copy: give what new_state returned"
            )
        if len(state.layers) != len(self.spec.layers):
            raise ValueError(
                f"the state has {len(state.layers)} layers, the model {len(self.spec.layers)}"
            )

    @property
    def _is_capturable(self) -> bool:
        return self.may_capture and can_capture(self.backend, self.placed)

    def _replay(self, batch: Batch) -> Replay:
        """The captured forward for batches of this shape."""
        assert isinstance(self.backend, Captures)
        capture = partial(self.backend.capture, self.forward, batch)
        return self._replays.get(batch.shape, capture)


def build_model(placed: Placed, builder: Builder, default_backend: str) -> LFM2:
    """The model that `placed` describes, with `builder`'s weights."""
    assert isinstance(placed.spec, specs.Model | TrimmedModel)
    return LFM2(
        spec=placed.spec,
        placed=placed,
        forward=builder.build(placed),
        home=placed.outer,
        backend=builder.create(default_backend),
        may_capture=builder.may_capture,
    )


def can_capture(backend: Backend, placed: Placed) -> bool:
    """Returns whether a forward of `placed` can be captured by the plan's default backend."""
    return isinstance(backend, Captures) and placed.copies() == 0
