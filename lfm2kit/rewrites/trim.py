"""Leaves out the rows that no logit depends on, in the last layers.

The last token's logits need one row of the last layer, and a convolution looks back at a few rows
only: so one row comes out of the last layer of a sequence, a few out of the one before, up to the
last attention, which looks at all of them.  A `TrimmedLayer` takes the place of each such layer;
the core joins it of the parts that every backend has, and the logits keep their bits.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Array, Block, Operator
from lfm2kit.batch import Batch
from lfm2kit.building.joins import Join
from lfm2kit.errors import Lfm2kitError
from lfm2kit.rewrites.rewrite import Rewrite
from lfm2kit.specs import Layer, Model, Part, ShortConv, Spec, Work


@dataclass(frozen=True, slots=True)
class TrimmedLayer(Spec):
    """(hidden, delta, batch, None) -> (hidden, delta), of fewer rows each; no state.

    rows = rows_of(batch, reach_in, reach_out), the rows that come in;
    hidden, x = operator_norm(hidden, delta); delta = operator(x, rows, None);
    hidden, delta = last_rows(hidden, delta, rows);
    hidden, x = ffn_norm(hidden, delta);      delta = feed_forward(x).
    """

    layer: Layer
    last_rows: Spec
    reach_in: int | None  # rows before the first wanted one that come in; None: all there are
    reach_out: int | None  # and that go out; None: the wanted rows alone
    kind: ClassVar[str] = "layer"

    @property
    def rows_out(self) -> int:
        """Return how many rows of a sequence go out, if it is long and wants its last logits."""
        return 1 + (self.reach_out or 0)

    def parts(self) -> tuple[Part, ...]:
        operator_norm, operator, ffn_norm, feed_forward = self.layer.parts()
        last_rows = Part("last_rows", "", self.last_rows)
        return operator_norm, operator, last_rows, ffn_norm, feed_forward

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        rows = rows_of(batch, self.reach_in, self.reach_out)
        kept = Batch.of_sequences([[0]] * len(rows.logits_rows))
        total = Work(0, 0)
        for part in self.parts():
            seen = kept if part.role in ("ffn_norm", "feed_forward") else rows
            total += part.spec.work(seen, itemsize)
        return total

    def derives(self) -> Hashable:
        reaches = self.reach_in, self.reach_out
        return None if reaches == (None, None) else (rows_of, *reaches)

    def note(self) -> str:
        return f"{self.rows_out} of a sample's rows go on after its operator"


@dataclass(frozen=True, slots=True)
class KeptRows(Spec):
    """(hidden, delta, batch) -> (hidden, delta), as they are: the last layer gave the last rows."""

    kind: ClassVar[str] = "rows"


def trim(model: Model) -> Model:
    """Return the model whose layers from the last attention on compute no row in vain."""
    layers = list(model.layers)
    first = _first_trimmed(layers)
    reach_out = None
    for i in reversed(range(first, len(layers))):
        layer = layers[i]
        assert isinstance(layer, Layer), "as `_first_trimmed` has made sure"
        reach_in = None  # attention looks at all rows, and all come out of the layer before
        if i > first:
            assert isinstance(layer.operator, ShortConv)
            reach_in = (reach_out or 0) + layer.operator.kernel_size - 1
        layers[i] = TrimmedLayer(layer, model.last_rows, reach_in, reach_out)
        reach_out = reach_in
    return replace(model, layers=tuple(layers), last_rows=KeptRows())


def _first_trimmed(layers: list[Spec]) -> int:
    """Return the last layer that needs all rows; those after it are convolutions."""
    if not isinstance(layers[-1], Layer):
        raise Lfm2kitError(
            f"rewrite 'trim' cannot leave out rows of a {type(layers[-1]).__name__}, which another "
            "rewrite has made; give trim first"
        )
    first = len(layers) - 1
    while first > 0 and _is_cut(layers[first]) and isinstance(layers[first - 1], Layer):
        first -= 1
    return first


def _is_cut(layer: Spec) -> bool:
    """Return whether a layer can do with a few rows before the wanted ones."""
    return isinstance(layer, Layer) and isinstance(layer.operator, ShortConv)


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
        rows = rows_of(batch, *self.reach)
        hidden, x = self.operator_norm(hidden, delta)
        delta = self.operator(x, rows, None)
        hidden, delta = self.last_rows(hidden, delta, rows)
        hidden, x = self.ffn_norm(hidden, delta)
        return hidden, self.feed_forward(x)

    def new_state(self, *room: object) -> NoReturn:
        raise Lfm2kitError("a trimmed model has no state: later tokens need the rows it leaves out")


def _hand_through(spec: KeptRows) -> Block:
    return lambda hidden, delta, batch: (hidden, delta)


TRIM = Rewrite(
    name="trim",
    summary="Leave out rows that no logit depends on, in the last layers.",
    apply=trim,
    joins={
        TrimmedLayer: partial(Join, TrimmedDecoderLayer),
        KeptRows: partial(Join, _hand_through),
    },
    has_state=False,
    keeps_rows=False,
)


def rows_of(batch: Batch, reach_in: int | None, reach_out: int | None) -> Batch:
    """Return the batch of fewer rows that a trimmed layer's operator is given.

    Each sequence begins `reach_in` rows before its first row in `logits_rows`, and counts as a
    whole one; None keeps all rows.  The new `logits_rows` begin `reach_out` rows before that row;
    None keeps them.  Its token ids mean nothing.
    """

    def make(host: Batch) -> Batch:
        return _asking_from(_beginning_at(host, reach_in), reach_out)

    return batch.derived((rows_of, reach_in, reach_out), make)


def _beginning_at(batch: Batch, reach: int | None) -> Batch:
    if reach is None:
        return batch
    rows = _rows_from(batch, reach)
    _, lengths = np.unique(_sequence_of_rows(batch)[rows], return_counts=True)
    shorter = Batch.of_sequences([np.zeros(n, np.int32) for n in lengths])
    logits_rows = np.searchsorted(rows, batch.logits_rows).astype(np.int32)
    return shorter.unchecked(logits_rows=logits_rows)


def _asking_from(batch: Batch, reach: int | None) -> Batch:
    if reach is None:
        return batch
    return batch.unchecked(logits_rows=_rows_from(batch, reach))


def _rows_from(batch: Batch, reach: int) -> npt.NDArray[np.int32]:
    """Return each sequence's rows from `reach` before the first of its `logits_rows` on."""
    sequence = _sequence_of_rows(batch)
    first = np.full(batch.sequences, batch.tokens + reach)  # where none is wanted: out of reach
    np.minimum.at(first, sequence[batch.logits_rows], batch.logits_rows)
    return np.flatnonzero(np.arange(batch.tokens) >= first[sequence] - reach).astype(np.int32)


def _sequence_of_rows(batch: Batch) -> npt.NDArray[np.intp]:
    return np.repeat(np.arange(batch.sequences), np.diff(batch.cu_seqlens))
