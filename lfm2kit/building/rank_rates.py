"""How fast a rank computes all but experts, and how fast ranks talk: parts of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lfm2kit import bounds
from lfm2kit.backend import Spec, Weights
from lfm2kit.building.curves import Curve, read_curve
from lfm2kit.building.records import Record
from lfm2kit.memory import HOST

MOST_ROWS = 2**26  # of a product
MOST_BYTES = 2**50  # of a block, or of a message
NOTHING = "nothing"  # the format of a block's weights if it has none


def stored_formats(spec: Spec, weights: Weights) -> str:
    """Return the format of a block's weights in the checkpoint, or all of them: "F16 and F32".

    `weights` are those of the scope of `spec`.
    """
    return " and ".join(sorted({str(weights[n].format) for n in spec.parameters()})) or NOTHING


class BlockKey(NamedTuple):
    """What a block's rates depend on, beside the machine."""

    block: str  # the spec, as Python writes it
    backend: str  # without its precision
    precision: str
    stored: str  # as `stored_formats` returns it

    @classmethod
    def of(cls, spec: Spec, weights: Weights, item: str, precision: str) -> BlockKey:
        """Return the key of the block that a plan's item builds, in the precision it has.

        `weights` are those of the scope of `spec`.
        """
        return cls(repr(spec), item.partition(":")[0], precision, stored_formats(spec, weights))

    def __str__(self) -> str:
        stored = "" if self.stored == NOTHING else f" stored in {self.stored}"
        return f"{self.block}{stored}, by {self.backend} in {self.precision}"


@dataclass(frozen=True, slots=True)
class BlockRates:
    """The seconds of a block that computes no experts, by rows."""

    key: BlockKey
    kept_bytes: int  # of its weights; 0 if it has none, or its backend does not say
    call: Curve

    def document(self) -> dict[str, Any]:
        rows = self.call.document("rows")
        return {**self.key._asdict(), "kept_bytes": self.kept_bytes, **rows}


class ExchangeKey(NamedTuple):
    """Who exchanged messages with each other: all of some ranks, evenly on some machines."""

    ranks: int
    machines: int
    memory: str = HOST.name  # in which they are: the host's, or that of the first rank's device


@dataclass(frozen=True, slots=True)
class ExchangeRates:
    """The seconds of an exchange in which each rank sends a message to each other one.

    Past the host, they are those of a layer: its tokens go out and their products come back, and
    the bytes are those of both messages.  Rows that stay on their rank are copied meanwhile.
    """

    key: ExchangeKey
    call: Curve  # by the bytes to each other rank

    def document(self) -> dict[str, Any]:
        return {**self.key._asdict(), **self.call.document("bytes")}


def read_block(record: Record) -> BlockRates:
    """Return the rates that `BlockRates.document` wrote."""
    key = BlockKey(*(record.text(name) for name in BlockKey._fields))
    rates = BlockRates(
        key, record.whole("kept_bytes", 0, MOST_BYTES), read_curve(record, "rows", MOST_ROWS)
    )
    record.done()
    return rates


def read_exchange(record: Record) -> ExchangeRates:
    """Return the rates that `ExchangeRates.document` wrote."""
    ranks = record.whole("ranks", 2, bounds.COUNT)
    key = ExchangeKey(ranks, record.whole("machines", 1, ranks), record.text("memory"))
    rates = ExchangeRates(key, read_curve(record, "bytes", MOST_BYTES))
    record.done()
    return rates
