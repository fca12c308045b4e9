"""What the ranks of a job sent each other in a run, how even the load was, and who waited."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lfm2kit.building.byte_counts import size
from lfm2kit.model import LFM2
from lfm2kit.ranks.agreement import on_first
from lfm2kit.ranks.balancing import max_over_mean
from lfm2kit.transport import Counted, ExchangeCounts, Sent, Transport

OPERATIONS = ("counts", "dispatch", "combine")  # of an exchange, in the order of its calls


@dataclass(frozen=True, slots=True)
class Exchanged:
    """The counts of all ranks, those of rank 0 first, as each rank told them.

    A rank that is alone in its group exchanges nothing, and has zeros.
    """

    ranks: Sequence[dict[str, Any]]
    groups: Sequence[Sequence[int]]  # the ranks that exchange tokens with each other

    def document(self, seconds: float) -> dict[str, Any]:
        """Return the fields for a run of `seconds`; lists are by rank, or by expert."""
        return {
            "layers": [self._layer(name) for name in self._layers()],
            "gather": _by_rank([rank["gather"] for rank in self.ranks]),
            "bytes": [self._bytes(rank) for rank in self.ranks],
            "rows_max_over_mean": self.imbalance(),
            "waited_seconds": self.waited(),
            "waited_share": self._waited_share(seconds),
        }

    def line(self, seconds: float) -> str:
        """Return a summary of a run of `seconds`."""
        sent = [self._bytes(rank) for rank in self.ranks]
        said = f"Ranks: {size(sum(sent) / len(sent))} sent by each on average"
        imbalance = self.imbalance()
        if imbalance is not None:
            said += f", rows max/mean {imbalance:.2f}"
            said += f", {self._waited_share(seconds):.0%} of the time waiting for others"
        return said

    def imbalance(self) -> float | None:
        """Return `max_over_mean` of the rows that were computed."""
        sharing = [number for number, rank in enumerate(self.ranks) if rank["layers"]]
        rows = (self._layer(name)["rows_by_rank"] for name in self._layers())
        return max_over_mean([of_layer[rank] for rank in sharing] for of_layer in rows)

    def waited(self) -> list[float]:
        """Return the seconds that each rank waited for others in exchanges.

        They are what it spent in an operation of a layer beyond the rank of its group that spent
        least there: the last to come waits for nobody.
        """
        waited = [0.0] * len(self.ranks)
        for name in self._layers():
            for operation in OPERATIONS:
                spent = self._layer(name)[operation]["seconds"]
                for group in self.groups:
                    least = min(spent[rank] for rank in group)
                    for rank in group:
                        waited[rank] += spent[rank] - least
        return waited

    def _waited_share(self, seconds: float) -> float:
        waited = self.waited()
        return sum(waited) / len(waited) / seconds

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(name for rank in self.ranks for name in rank["layers"]))

    def _layer(self, name: str) -> dict[str, Any]:
        there = [rank["layers"].get(name) for rank in self.ranks]
        experts = max(len(one["expert_rows"]) for one in there if one is not None)
        nothing = _told(ExchangeCounts(Sent(), Sent(), Sent(), 0, np.zeros(experts, np.int64)))
        counts = [one or nothing for one in there]
        by_expert = [one["expert_rows"] for one in counts]
        return {
            "layer": name,
            **{operation: _by_rank([one[operation] for one in counts]) for operation in OPERATIONS},
            "copied_rows": [one["copied_rows"] for one in counts],
            "rows_by_rank": [sum(rows) for rows in by_expert],
            "rows_by_expert": [sum(rows) for rows in zip(*by_expert, strict=True)],
            "rows_by_rank_and_expert": by_expert,
        }

    def _bytes(self, rank: dict[str, Any]) -> int:
        """Return all bytes that a rank sent to others."""
        exchanged = (
            layer[name]["bytes"] for layer in rank["layers"].values() for name in OPERATIONS
        )
        return int(sum(exchanged) + rank["gather"]["bytes"])


def begin(model: LFM2) -> None:
    """Forget what the model's exchanges have counted up to now."""
    for _ in _counted(model):
        pass


def ended(
    model: LFM2, transport: Transport, gather: Sent, groups: Sequence[Sequence[int]]
) -> Exchanged | None:
    """Return the counts of all ranks since `begin`, on rank 0; None elsewhere.

    `gather` is what this rank sent when the logits were gathered.  Every rank calls this.
    """
    layers = {name: _told(counts) for name, counts in _counted(model)}
    lines = on_first(transport, json.dumps({"layers": layers, "gather": asdict(gather)}))
    return None if lines is None else Exchanged([json.loads(line) for line in lines], groups)


def _counted(model: LFM2) -> Iterator[tuple[str, ExchangeCounts]]:
    for name, exchange in model.exchanges.items():
        if isinstance(exchange, Counted):
            yield name, exchange.counted()


def _told(counts: ExchangeCounts) -> dict[str, Any]:
    return asdict(counts) | {"expert_rows": counts.expert_rows.tolist()}


def _by_rank(records: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [record[name] for record in records] for name in records[0]}
