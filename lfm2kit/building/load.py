"""How many tokens chose each expert: recorded by a run, read to decide where experts are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any, NamedTuple

from lfm2kit import bounds, specs
from lfm2kit.building.records import Record, read_record
from lfm2kit.errors import Lfm2kitError

KIND, VERSION = "lfm2kit load", 1
MADE_BY = "record one with lfm2kit run, whose help says how"
MOST = 2**53  # tokens: whole numbers that every reader of JSON keeps


class LayerLoad(NamedTuple):
    """The load of one layer's experts."""

    layer: int
    num_experts_per_tok: int
    counts: tuple[int, ...]  # tokens that chose each expert, [experts]
    by_rank: tuple[tuple[int, ...], ...] = ()  # those of each rank of a job, [ranks][experts]

    def document(self) -> dict[str, Any]:
        """Return the fields of the layer in a file; `ranks` is there for a job's load alone."""
        fields = self._asdict()
        ranks = [{"counts": counts} for counts in fields.pop("by_rank")]
        return {**fields, "ranks": ranks} if ranks else fields


@dataclass(frozen=True, slots=True)
class Load:
    """The load of all experts of a model in some forwards."""

    model: str
    hidden_size: int
    tokens: int  # of these forwards, all together
    layers: tuple[LayerLoad, ...]  # those that have experts

    def shares(self) -> list[list[float]]:
        """Return the part of all tokens that chose each expert, [layers][experts]."""
        return [[count / self.tokens for count in layer.counts] for layer in self.layers]

    def check(self, path: Path, model: specs.Model) -> None:
        """Raise `Lfm2kitError` if the load, which `path` holds, is of a model of other sizes."""
        hidden_size = model.embed_tokens.hidden_size
        if self.hidden_size != hidden_size:
            raise Lfm2kitError(
                f"{path}: of a model with hidden_size {self.hidden_size} ({self.model}), "
                f"not {hidden_size}; {MADE_BY}"
            )
        there = {layer.layer: _in_words(layer) for layer in self.layers}
        wanted = {layer.layer: _in_words(layer) for layer in unused(model)}
        for layer in sorted(there.keys() | wanted.keys()):
            if there.get(layer) != wanted.get(layer):
                raise Lfm2kitError(
                    f"{path}: of another model ({self.model}): its layer {layer} has "
                    f"{there.get(layer, 'no experts')}, not {wanted.get(layer, 'none')}; {MADE_BY}"
                )

    def document(self) -> dict[str, Any]:
        """Return the fields of the file that `read_load` reads."""
        return {
            "kind": KIND,
            "version": VERSION,
            "model": self.model,
            "hidden_size": self.hidden_size,
            "tokens": self.tokens,
            "layers": [layer.document() for layer in self.layers],
        }


def read_load(path: Path) -> Load:
    """Return the load in a file; raise `Lfm2kitError`, which names the field that is wrong."""
    record = read_record(path, KIND, VERSION, MADE_BY)
    tokens = record.whole("tokens", 1, MOST)
    load = Load(
        record.text("model"),
        record.whole("hidden_size", 1, bounds.WIDTH),
        tokens,
        tuple(_layer(layer, tokens) for layer in record.records("layers")),
    )
    record.done()
    numbers = [layer.layer for layer in load.layers]
    if numbers != sorted(set(numbers)):
        order = f"layers are numbered {brief(numbers)}; expected each once, in ascending order"
        raise Lfm2kitError(f"{path}: {order}")
    return load


def load_of(path: Path | None, model: specs.Model) -> Load | None:
    """Return the load in a file, if there is one; `Lfm2kitError` if it is of another model."""
    if path is None:
        return None
    load = read_load(Path(path))
    load.check(Path(path), model)
    return load


def uniform(model: specs.Model) -> list[list[float]]:
    """Return shares as `Load.shares` does, as if all experts of a layer were chosen alike."""
    sizes = ((len(one.counts), one.num_experts_per_tok) for one in unused(model))
    return [[chosen / experts] * experts for experts, chosen in sizes]


def unused(model: specs.Model) -> Iterator[LayerLoad]:
    """Yield the load of each layer that has experts, if no token has chosen any of them."""
    for i, layer in enumerate(model.layers):
        for leaf in specs.leaves(layer):
            if isinstance(leaf, specs.Choice):
                yield LayerLoad(i, leaf.num_experts_per_tok, (0,) * leaf.num_experts)


def _layer(record: Record, tokens: int) -> LayerLoad:
    counts = record.wholes("counts", 0, tokens)
    if not 1 <= len(counts) <= bounds.EXPERTS:
        raise record.fail("counts", f"1 to {bounds.EXPERTS} numbers")
    layer = LayerLoad(
        record.whole("layer", 0, bounds.LAYERS - 1),
        record.whole("num_experts_per_tok", 1, len(counts)),
        counts,
        tuple(_of_ranks(record, counts)) if record.has("ranks") else (),
    )
    if sum(counts) > tokens * layer.num_experts_per_tok:
        raise record.fail("counts", f"{tokens * layer.num_experts_per_tok} choices at most")
    record.done()
    return layer


def _of_ranks(record: Record, counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the counts of each rank's tokens, which add up to `counts`."""
    left = list(counts)
    for rank in record.records("ranks"):
        own = rank.wholes("counts", 0, max(counts))
        rank.done()
        if len(own) != len(counts):
            raise rank.fail("counts", f"{len(counts)} numbers")
        left = [total - mine for total, mine in zip(left, own, strict=True)]
        yield own
    if any(left):
        raise record.fail("ranks", "counts that add up to those of the layer")


def _in_words(layer: LayerLoad) -> str:
    return f"{layer.num_experts_per_tok} of {len(layer.counts)} experts"
