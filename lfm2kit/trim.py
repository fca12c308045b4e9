"""`--trim`: a model whose last layers leave out the rows that no logit depends on.

The last token's logits need one row of the last layer, and a convolution looks back at a few rows
only: so one row comes out of the last layer of a sequence, a few out of the one before, up to the
last attention, which looks at all of them.  `trim` puts a `TrimmedLayer` in the place of each such
layer; the core joins it of the parts that every backend has, and the logits keep their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lfm2kit.batch import Batch
from lfm2kit.specs import Embedding, LastRows, Layer, LMHead, Model, Part, ShortConv, Spec, Work


@dataclass(frozen=True, slots=True)
class TrimmedLayer(Spec):
    """(hidden, delta, batch, None) -> (hidden, delta), of fewer rows each; no state.

    rows = batch.trimmed(reach_in, reach_out), the rows that come in;
    hidden, x = operator_norm(hidden, delta); delta = operator(x, rows, None);
    hidden, delta = last_rows(hidden, delta, rows);
    hidden, x = ffn_norm(hidden, delta);      delta = feed_forward(x).
    """

    layer: Layer
    last_rows: LastRows
    reach_in: int | None  # rows before the first wanted one that come in; None: all there are
    reach_out: int | None  # and that go out; None: the wanted rows alone
    kind: ClassVar[str] = "layer"

    @property
    def rows_out(self) -> int:
        """How many rows of a sequence go out, if it is long enough and wants its last logits."""
        return 1 + (self.reach_out or 0)

    def parts(self) -> tuple[Part, ...]:
        operator_norm, operator, ffn_norm, feed_forward = self.layer.parts()
        last_rows = Part("last_rows", "", self.last_rows)
        return operator_norm, operator, last_rows, ffn_norm, feed_forward

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        rows = batch.trimmed(self.reach_in, self.reach_out)
        kept = Batch.of_sequences([[0]] * len(rows.logits_rows))
        total = Work(0, 0)
        for part in self.parts():
            seen = kept if part.role in ("ffn_norm", "feed_forward") else rows
            total += part.spec.work(seen, itemsize)
        return total


@dataclass(frozen=True, slots=True)
class TrimmedModel(Spec):
    """(batch, None) -> logits, those of `Model`: the last layer gives the last rows alone."""

    whole: Model
    layers: tuple[Layer | TrimmedLayer, ...]
    kind: ClassVar[str] = "model"

    @property
    def embed_tokens(self) -> Embedding:
        return self.whole.embed_tokens

    @property
    def lm_head(self) -> LMHead:
        return self.whole.lm_head

    def parts(self) -> tuple[Part, ...]:
        layers = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}
        return tuple(
            part._replace(spec=layers.get(part.role, part.spec))
            for part in self.whole.parts()
            if part.role != "last_rows"
        )


def trim(model: Model) -> TrimmedModel:
    """The model whose layers from the last attention on compute no row that no logit needs."""
    layers: list[Layer | TrimmedLayer] = list(model.layers)
    reach_out = None
    for i in reversed(range(len(layers))):
        layer = model.layers[i]
        reach_in = None  # attention looks at all rows, and all come out of the embedding
        if isinstance(layer.operator, ShortConv) and i > 0:
            reach_in = (reach_out or 0) + layer.operator.kernel_size - 1
        layers[i] = TrimmedLayer(layer, model.last_rows, reach_in, reach_out)
        if reach_in is None:
            break
        reach_out = reach_in
    return TrimmedModel(model, tuple(layers))
