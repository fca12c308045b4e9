"""The experts that tokens choose: drawn by a load, or traced in a model's forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.building.load import Load, uniform, unused
from lfm2kit.rewrites.recorded_load import LoadRecorder

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts that the tokens of some samples choose, by the number of the layer."""

    seq_len: int  # tokens of each sample
    layers: Mapping[int, Int32]  # ids [samples * seq_len, k]; -1 stands for no expert

    def of(self, layer: int, samples: range) -> Int32:
        """Return the ids that a layer's tokens of some consecutive samples choose, [tokens, k]."""
        return self.layers[layer][samples.start * self.seq_len : samples.stop * self.seq_len]


def drawn(
    model: specs.Model, load: Load | None, samples: int, seq_len: int, seed: int = 0
) -> Routing:
    """Return a routing in which each expert is as likely as in the load; without one, all alike."""
    rng = np.random.default_rng(seed)
    shares = uniform(model) if load is None else load.shares()
    layers = zip(unused(model), shares, strict=True)
    tokens = samples * seq_len
    return Routing(
        seq_len,
        {one.layer: _drawn(rng, share, one.num_experts_per_tok, tokens) for one, share in layers},
    )


def _drawn(rng: np.random.Generator, shares: Sequence[float], k: int, tokens: int) -> Int32:
    """Return different experts for each token, [tokens, k].

    Each is chosen with the probability of its share.  For that a token's experts are laid out in a
    random order, each as long as its share, and taken where a whole number plus a random part is.
    """
    order = rng.random((tokens, len(shares)), np.float32).argsort(axis=1)
    ends = np.cumsum(np.array(shares, np.float64)[order], axis=1) + rng.random((tokens, 1))
    ends = np.floor(ends + 1e-9)  # shares are sums of many numbers, and end at k or a little less
    is_taken = np.diff(ends, axis=1, prepend=0.0) > 0
    places = (~is_taken).argsort(axis=1, kind="stable")[:, :k]
    ids = np.take_along_axis(order, places, axis=1)
    taken = np.take_along_axis(is_taken, places, axis=1)
    return np.where(taken, ids, -1).astype(np.int32)


class RoutingRecorder(LoadRecorder):
    """A recorder of a model's load that keeps the ids as well.  Its rewrite is that of a load."""

    def __init__(self) -> None:
        super().__init__()
        self._ids: dict[int, list[Int32]] = {}

    def routing(self, seq_len: int) -> Routing:
        """Return the routing of the forwards up to now, of samples of `seq_len` tokens."""
        self._settle()
        layers = {layer: np.concatenate(ids) for layer, ids in self._ids.items()}
        return Routing(seq_len, layers)

    def _add(self, layer: int, arrived: Callable[[], Any]) -> None:
        def keep() -> Any:
            ids = arrived()
            self._ids.setdefault(layer, []).append(ids)
            return ids

        super()._add(layer, keep)
