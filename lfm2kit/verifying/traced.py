"""Writes down what comes out of each layer of a model, or compares it with such a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Array, Operator, Room
from lfm2kit.batch import Batch
from lfm2kit.building.joins import Join
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.placement import Placed
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.memory import HOST, Memory
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites.rewrite import Rewrite
from lfm2kit.specs import Model, Part, Spec
from lfm2kit.testing.near_ties import GapWatch
from lfm2kit.verifying.differences import Difference, farthest
from lfm2kit.verifying.forced import FORWARD
from lfm2kit.verifying.near_ties import is_clear
from lfm2kit.verifying.traces import Float32, Trace
from lfm2kit.verifying.twins import twin
from lfm2kit.verifying.verification import Verification

OPERATIONS = 2  # of a layer, each with the error of a block
ENDING_BLOCKS = 2  # that make logits of the last layer's rows: a norm and a head


@dataclass(frozen=True, slots=True)
class TracedLayer(Spec):
    """(hidden, delta, batch, state) -> (hidden, delta), those of `layer` or of a trace."""

    layer: Spec
    number: int
    kind: ClassVar[str] = "layer"

    def parts(self) -> tuple[Part, ...]:
        return (Part("layer", "", self.layer),)


class Through(Protocol):
    """Somebody through whom all layers are called."""

    def call(self, number: int, layer: Layer, hidden: Float32, batch: Batch) -> Float32:
        """Return the sum of hidden and delta after a layer that gets `hidden`, on the host."""
        ...


# A layer without a state, which takes and returns the sum of hidden and delta on the host.
Layer = Callable[[Float32], Float32]


def recorded(
    checkpoint: Checkpoint, options: Options, ids: npt.NDArray[np.int32]
) -> tuple[Setup, Trace]:
    """Run samples [n, seq_len] through a model, and return its set-up and the trace."""
    recorder = _Recorder()
    setup, logits = _run(checkpoint, options, ids, recorder)
    assert recorder.embedded is not None
    return setup, Trace(ids, recorder.embedded, recorder.layers, logits)


def verify_against_trace(
    checkpoint: Checkpoint, options: Options, trace: Trace
) -> tuple[Setup, Verification]:
    """Run a trace's samples through a model whose layers get what the trace has before them."""
    comparer = _Comparer(checkpoint, trace)
    setup, logits = _run(checkpoint, options, trace.token_ids, comparer)
    return setup, comparer.verification(setup, logits)


def _run(
    checkpoint: Checkpoint, options: Options, ids: npt.NDArray[np.int32], through: Through
) -> tuple[Setup, Float32]:
    setup = set_up(checkpoint, options, rewrites=[_rewrite(through)], tokens=ids.size)
    model = setup.build(tokens=ids.size)
    return setup, np.array(model.logits(Batch.of_sequences(list(ids))))


def _rewrite(through: Through) -> Rewrite:
    def apply(model: Model) -> Model:
        layers = (TracedLayer(layer, number) for number, layer in enumerate(model.layers))
        return replace(model, layers=tuple(layers))

    def join(outer: Memory) -> Join:
        def make(spec: TracedLayer, layer: Operator) -> Operator:
            return _Traced(through, spec.number, layer, outer)

        return Join(make, outer, is_capturable=False)

    return Rewrite(
        name="traced",
        summary="Write down or replace what layers return.",
        apply=apply,
        joins={TracedLayer: join},
        needs_rows=True,
    )


class _Traced:
    """A layer that is called through somebody."""

    def __init__(self, through: Through, number: int, layer: Operator, memory: Memory) -> None:
        self._through, self._number = through, number
        self._layer, self._memory = layer, memory

    def __call__(
        self, hidden: Array, delta: Array | None, batch: Batch, state: Any
    ) -> tuple[Array, Array]:
        def layer(host: Float32) -> Float32:
            moved = self._memory.from_host(host.copy())
            return self._sum(*self._layer(moved, None, batch, state))

        after = self._through.call(self._number, layer, self._sum(hidden, delta), batch)
        zeros = np.zeros_like(after)
        return self._memory.from_host(after.copy()), self._memory.from_host(zeros)

    def _sum(self, hidden: Array, delta: Array | None) -> Float32:
        host = np.array(self._memory.to_host(hidden))
        return host if delta is None else host + np.array(self._memory.to_host(delta))

    def new_state(self, room: Room) -> Any:
        return self._layer.new_state(room)


class _Recorder:
    """Writes down what layers get and return."""

    def __init__(self) -> None:
        self.embedded: Float32 | None = None
        self.layers: dict[int, Float32] = {}

    def call(self, number: int, layer: Layer, hidden: Float32, batch: Batch) -> Float32:
        if number == 0:
            self.embedded = hidden
        self.layers[number] = layer(hidden)
        return self.layers[number]


class _Comparer:
    """Gives each layer what a trace has before it, and keeps what the layer makes of that."""

    def __init__(self, checkpoint: Checkpoint, trace: Trace) -> None:
        self._checkpoint, self._trace = checkpoint, trace
        self._embedded: Float32 | None = None
        self._layers: dict[int, Float32] = {}

    def call(self, number: int, layer: Layer, hidden: Float32, batch: Batch) -> Float32:
        if number == 0:
            self._embedded = hidden
        self._layers[number] = layer(self._before(number))
        return self._trace.layers[number]

    def _before(self, number: int) -> Float32:
        return self._trace.embedded if number == 0 else self._trace.layers[number - 1]

    def verification(self, setup: Setup, logits: Float32) -> Verification:
        """Return how far each layer, the embedding and the logits are from the trace."""
        error, trace = setup.grade.block_error, self._trace
        by_name = {part.name: part for _, part in setup.placed.parts}

        def difference(name: str, got: Any, want: Float32, blocks: int) -> Difference:
            return self._difference(by_name[name], got, want, blocks * error)

        found = [
            difference("embed_tokens", self._embedded, trace.embedded, 1),
            *(
                difference(f"layers.{i}", got, trace.layers[i], OPERATIONS)
                for i, got in self._layers.items()
            ),
            difference("lm_head", logits, trace.logits, ENDING_BLOCKS),
        ]
        return Verification(found, {})

    def _difference(self, placed: Placed, got: Any, want: Float32, allowed: float) -> Difference:
        fields = farthest(got, want)
        if isinstance(placed.spec, TracedLayer) and fields["error"] > allowed:
            fields = farthest(got, want, allowed, self._is_clear(placed, placed.spec, allowed))
        backends = " and ".join(dict.fromkeys(str(leaf.backend) for leaf in placed.leaves()))
        kind = placed.spec.kind
        return Difference(placed.name, kind, backends, FORWARD, allowed=allowed, **fields)

    def _is_clear(self, placed: Placed, spec: TracedLayer, allowed: float) -> npt.NDArray[np.bool_]:
        """Return for each row whether the reference has no router near a tie there."""
        watch = GapWatch(ReferenceBackend())
        block = twin(watch, placed.name, spec.layer, self._checkpoint.values.scope(placed.scope))
        batch = Batch.of_sequences(list(self._trace.token_ids))
        block(self._before(spec.number).copy(), None, batch.on(HOST), None)
        return is_clear(watch, allowed, batch.tokens)
