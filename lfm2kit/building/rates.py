"""How fast a machine computes experts and moves them: measured once, kept in a file.

Rates are of experts of one size, stored in one format and computed by one backend in one precision:
any of these changes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lfm2kit import bounds, specs
from lfm2kit.backend import Ceilings, Weights
from lfm2kit.building.curves import Curve, Float64, read_curve
from lfm2kit.building.rank_rates import (
    MOST_BYTES,
    MOST_ROWS,
    BlockRates,
    ExchangeRates,
    read_block,
    read_exchange,
    stored_formats,
)
from lfm2kit.building.records import Record, read_record
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32, PLAIN, Format

KIND, VERSION = "lfm2kit rates", 6
MADE_BY = "measure with lfm2kit calibrate"


@dataclass(frozen=True, slots=True)
class Rates:
    """What it takes to compute experts of one size on the host, and on the device or over the link.

    The device is wherever the model's memory is; the link leads there from the host's memory.
    """

    expert_bytes: int  # of an expert in the device's memory, and on the link
    host: Curve
    device: Curve
    link: float  # bytes per second to the device
    to_host: float = math.inf  # bytes per second from the device
    host_expert_bytes: int = 0  # of an expert where the host computes it
    host_memory: float = math.inf  # bytes per second that all who read it get together

    def host_seconds(self, rows: Any, *, beside_link: bool) -> Float64:
        """Return the host's seconds for an expert with `rows` rows.

        What the link carries is read from the host's memory as well.  Of two who read it at once,
        neither gets less than half.
        """
        alone = self.host.at(rows)
        if not beside_link:
            return alone
        left = max(self.host_memory - self.link, self.host_memory / 2)
        return np.maximum(alone, self.host_expert_bytes / left)


class Link(NamedTuple):
    """Bytes per second between the host's memory and another one, each way alone.

    From the host they are those of streamed experts, where the backend streams them.
    """

    from_host: float
    to_host: float


class Call(NamedTuple):
    """What was measured of one call of experts."""

    experts: int
    fixed: float | None = None  # seconds that the number of experts does not change, if known


OF_ONE = Call(1)


class Experts(NamedTuple):
    """What experts' rates depend on, beside the machine."""

    backend: str  # without its precision
    precision: str
    hidden_size: int
    intermediate_size: int
    stored: str  # as `stored_formats` returns it

    @classmethod
    def of(cls, spec: specs.Experts, weights: Weights, item: str, precision: str) -> Experts:
        """Return the key of the experts that a plan's item builds, in the precision it has.

        `weights` are those of the scope of `spec`.
        """
        sizes = spec.hidden_size, spec.intermediate_size
        return cls(item.partition(":")[0], precision, *sizes, stored_formats(spec, weights))

    def __str__(self) -> str:
        size = f"{self.hidden_size} x {self.intermediate_size}"
        return f"{size} experts stored in {self.stored}, by {self.backend} in {self.precision}"


@dataclass(frozen=True, slots=True)
class Side:
    """The rates of experts where one backend computes them."""

    experts: Experts
    memory: str  # where the backend's blocks work
    expert_bytes: int  # that the backend keeps of an expert there
    product: Curve
    link: Link | None  # None: the memory is the host's
    ceilings: Ceilings | None  # None: the backend does not measure any
    hardware: Mapping[str, str]  # that the backend works on, as far as it says
    row_format: Format = F32  # in which the backend's experts read rows, and ranks send them
    # `product` has an expert's share of a call of several, of which some seconds would be the same
    # for any number of experts.
    call: Call = OF_ONE


@dataclass(frozen=True, slots=True)
class Calibration:
    """The rates of a machine."""

    date: str  # ISO 8601, in UTC
    machine: Mapping[str, str]
    model: str  # whose experts were measured
    sides: tuple[Side, ...]
    blocks: tuple[BlockRates, ...] = ()  # those that compute no experts
    exchanges: tuple[ExchangeRates, ...] = ()  # if there were several ranks
    copies: float | None = None  # bytes per second of rows that a rank copies in the host's memory

    def rates(self, path: Path, host: Experts, device: Experts) -> Rates:
        """Return the rates for experts in these two places.

        Raise `Lfm2kitError` if `path`, which the calibration was read from, does not have them.
        """
        there = {side.experts: side for side in self.sides}
        for asked in (host, device):
            if asked not in there:
                raise Lfm2kitError(
                    f"{path}: there are no rates of {asked}; available: {_listed(there)}; {MADE_BY}"
                )
        side, away = there[device], there[host]
        if side.link is None:
            raise Lfm2kitError(f"{path}: {device} are in the host's memory, which needs no link")
        memory = math.inf if away.ceilings is None else away.ceilings.bytes
        return Rates(
            side.expert_bytes,
            away.product,
            side.product,
            *side.link,
            away.expert_bytes,
            memory,
        )

    def replaced_by(self, newer: Calibration) -> Calibration:
        """Return what was measured last of everything that either of them has."""
        sides = {side.experts: side for side in (*self.sides, *newer.sides)}
        blocks = {block.key: block for block in (*self.blocks, *newer.blocks)}
        exchanges = {one.key: one for one in (*self.exchanges, *newer.exchanges)}
        return replace(
            newer,
            sides=tuple(sides.values()),
            blocks=tuple(blocks.values()),
            exchanges=tuple(exchanges.values()),
            copies=self.copies if newer.copies is None else newer.copies,
        )

    def document(self) -> dict[str, Any]:
        """Return the fields of the file that `read_calibration` reads."""
        return {
            "kind": KIND,
            "version": VERSION,
            "date": self.date,
            "machine": dict(self.machine),
            "model": self.model,
            "sides": [_document(side) for side in self.sides],
            "blocks": [block.document() for block in self.blocks],
            "exchanges": [exchange.document() for exchange in self.exchanges],
            "copies": self.copies,
        }


def read_calibration(path: Path) -> Calibration:
    """Return the calibration in a file; raise `Lfm2kitError`, which names the wrong field."""
    record = read_record(path, KIND, VERSION, MADE_BY)
    calibration = Calibration(
        record.text("date"),
        record.texts("machine"),
        record.text("model"),
        tuple(_side(side) for side in record.records("sides")),
        tuple(map(read_block, record.records("blocks"))),
        tuple(map(read_exchange, record.records("exchanges"))),
        record.optional("copies", record.rate),
    )
    record.done()
    _check_once(path, "sides", [side.experts for side in calibration.sides])
    _check_once(path, "blocks", [block.key for block in calibration.blocks])
    _check_once(path, "exchanges", [exchange.key for exchange in calibration.exchanges])
    return calibration


def _check_once(path: Path, name: str, measured: Sequence[object]) -> None:
    for i, one in enumerate(measured):
        if one in measured[:i]:
            raise Lfm2kitError(f"{path}: {name}[{i}] has rates of {one} again; keep the right ones")


def _listed(sides: Iterable[Experts]) -> str:
    return "; ".join(map(str, sides)) or "nothing"


def _document(side: Side) -> dict[str, Any]:
    return {
        **side.experts._asdict(),
        "memory": side.memory,
        "expert_bytes": side.expert_bytes,
        **side.product.document("rows"),
        "link": None if side.link is None else side.link._asdict(),
        "ceilings": None if side.ceilings is None else side.ceilings._asdict(),
        "hardware": dict(side.hardware),
        "row_format": side.row_format.name,
        "call": side.call._asdict(),
    }


def _side(record: Record) -> Side:
    side = Side(
        Experts(
            record.text("backend"),
            record.text("precision"),
            record.whole("hidden_size", 1, bounds.WIDTH),
            record.whole("intermediate_size", 1, bounds.WIDTH),
            record.text("stored"),
        ),
        record.text("memory"),
        record.whole("expert_bytes", 1, MOST_BYTES),
        read_curve(record, "rows", MOST_ROWS),
        record.optional("link", lambda key: _rates_of(Link, record.record(key))),
        record.optional("ceilings", lambda key: _rates_of(Ceilings, record.record(key))),
        record.texts("hardware"),
        _row_format(record),
        _call(record.record("call")),
    )
    record.done()
    return side


def _call(record: Record) -> Call:
    experts = record.whole("experts", 1, bounds.COUNT)
    call = Call(experts, record.optional("fixed", record.rate))
    record.done()
    return call


def _row_format(record: Record) -> Format:
    formats = {format.name: format for format in PLAIN}
    name = record.text("row_format")
    if name not in formats:
        raise record.fail("row_format", " or ".join(formats))
    return formats[name]


def _rates_of(kind: Any, record: Record) -> Any:
    """Return a tuple of rates, whose names are the fields of `kind`."""
    rates = kind(*(record.rate(name) for name in kind._fields))
    record.done()
    return rates
