"""Expert parallelism: every rank holds a share of each layer's experts; tokens travel to them.

A wrapper around a router and experts.  Neither they nor the forward know of it: `shard` puts an
`ExpertParallelMoe` in the place of every `SparseMoe`, and the core joins its parts with `join`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Block
from lfm2kit.specs import Experts, Part, Router, SparseMoe, Spec
from lfm2kit.transport import Transport, World, share

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExpertParallelMoe(Spec):
    """(x) -> delta, as `SparseMoe`, with `experts.local_experts` on this rank, the rest on others.

    x and delta are this rank's own tokens, [tokens, hidden_size], in host memory.  Every rank
    calls its block the same number of times, with no tokens if need be.
    """

    router: Router
    experts: Experts
    kind: ClassVar[str] = "moe"

    def parts(self) -> tuple[Part, ...]:
        return Part("router", "", self.router), Part("experts", "", self.experts)


def shard(model: specs.Model, world: World) -> specs.Model:
    """The model as rank `world.rank` builds it: all of it, but only a share of the experts."""

    def sharded(layer: specs.Layer) -> specs.Layer:
        moe = layer.feed_forward
        if not isinstance(moe, SparseMoe):
            return layer
        mine = share(moe.experts.num_experts, world.size, world.rank)
        experts = replace(moe.experts, local_experts=tuple(mine))
        return replace(layer, feed_forward=ExpertParallelMoe(moe.router, experts))

    return replace(model, layers=tuple(map(sharded, model.layers)))


def join(transport: Transport) -> Callable[..., Block]:
    """How the core makes an `ExpertParallelMoe` of its parts."""

    def make(spec: ExpertParallelMoe, router: Block, experts: Block) -> Block:
        return ExpertParallel(spec, router, experts, transport)

    return make


class ExpertParallel:
    """route -> dispatch -> experts -> combine.

    A token goes to each of its experts as a row of its own, and every row's weighted output
    comes back: the sum over a token's experts is then made here in the order of k, and has the
    same bits as without expert parallelism.
    """

    def __init__(
        self, spec: ExpertParallelMoe, router: Block, experts: Block, transport: Transport
    ) -> None:
        self.router = router
        self.experts = experts
        self.transport = transport
        size = transport.world.size
        shares = [share(spec.experts.num_experts, size, rank) for rank in range(size)]
        self.owner = np.repeat(np.arange(size), [len(s) for s in shares])  # [num_experts]

    def __call__(self, x: Floats) -> Floats:
        expert_ids, expert_weights = self.router(x)
        pairs = self._by_owner(expert_ids)
        rows, counts = self._dispatch(x, expert_ids, expert_weights, pairs)
        outputs = self.experts(rows["x"], rows["expert"][:, None], rows["weight"][:, None])
        return self._combine(outputs, counts, pairs, expert_ids.shape)

    def _by_owner(self, expert_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
        """The flat (token, k) pairs in the order in which they are sent: by rank."""
        return np.argsort(self.owner[expert_ids.reshape(-1)], kind="stable")

    def _dispatch(
        self,
        x: Floats,
        expert_ids: npt.NDArray[np.int32],
        expert_weights: Floats,
        pairs: npt.NDArray[np.intp],
    ) -> tuple[dict[str, npt.NDArray[Any]], list[int]]:
        """Sends each pair to its expert's rank; the rows that came here, and from whom."""
        experts = expert_ids.reshape(-1)[pairs]
        row = np.dtype([("expert", "<i4"), ("weight", "<f4"), ("x", "<f4", x.shape[1:])])
        rows = np.empty(len(pairs), row)
        rows["expert"] = experts
        rows["weight"] = expert_weights.reshape(-1)[pairs]
        rows["x"] = x[pairs // expert_ids.shape[1]]
        received, counts = self.transport.all_to_all(rows, self._counts(experts))
        fields = {name: np.ascontiguousarray(received[name]) for name in ("expert", "weight", "x")}
        return fields, counts

    def _counts(self, experts: npt.NDArray[np.int32]) -> list[int]:
        size = self.transport.world.size
        return [int(n) for n in np.bincount(self.owner[experts], minlength=size)]

    def _combine(
        self,
        outputs: Floats,
        counts: list[int],
        pairs: npt.NDArray[np.intp],
        shape: tuple[int, ...],
    ) -> Floats:
        """Sends every row's output back, and adds up each token's in the order of k."""
        returned, _ = self.transport.all_to_all(np.ascontiguousarray(outputs), counts)
        products = np.empty((len(pairs), outputs.shape[1]), np.float32)
        products[pairs] = returned
        products = products.reshape(*shape, outputs.shape[1])
        delta = products[:, 0].copy()
        for k in range(1, shape[1]):
            delta += products[:, k]
        return delta
