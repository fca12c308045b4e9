"""A whole layer: its norms round x for the products that follow, in the pass that makes it.

The choice of experts may lie elsewhere: on the CPU, in `hybrid`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cupy

from lfm2kit import specs
from lfm2kit.backend import Batch, Block, Weights
from lfm2kit_cuda.blocks.attention import Attention
from lfm2kit_cuda.blocks.feed_forward import MLP, SparseMoe, unheard
from lfm2kit_cuda.blocks.rows import RMSNorm
from lfm2kit_cuda.blocks.short_conv import ShortConv
from lfm2kit_cuda.products import Arithmetic

PARTS: dict[type[specs.Spec], Any] = {
    specs.RMSNorm: RMSNorm,
    specs.ShortConv: ShortConv,
    specs.Attention: Attention,
    specs.MLP: MLP,
    specs.SparseMoe: SparseMoe,
}


CHOICE = "feed_forward.router.choice"  # the part that may be computed elsewhere


class Layer:
    def __init__(
        self,
        spec: specs.Layer,
        weights: Weights,
        gemm: Arithmetic,
        elsewhere: Mapping[str, Block] | None = None,
    ) -> None:
        given = {"feed_forward": {"choice": elsewhere[CHOICE]}} if elsewhere else {}
        parts: dict[str, Any] = {
            p.role: PARTS[type(p.spec)](
                p.spec, weights.scope(p.scope), gemm, **given.get(p.role, {})
            )
            for p in spec.parts()
        }
        self.operator_norm, self.operator = parts["operator_norm"], parts["operator"]
        self.ffn_norm, self.feed_forward = parts["ffn_norm"], parts["feed_forward"]
        self.is_routed = isinstance(spec.feed_forward, specs.SparseMoe)
        self.new_state = self.operator.new_state
        self._passed: Callable[[str], None] = unheard

    def tell_parts(self, passed: Callable[[str], None] | None) -> None:
        self._passed = passed or unheard
        if isinstance(self.feed_forward, SparseMoe):
            inner = None if passed is None else (lambda part: passed(f"feed_forward.{part}"))
            self.feed_forward.tell_parts(inner)

    def __call__(
        self, hidden: cupy.ndarray, delta: cupy.ndarray | None, batch: Batch, state: Any
    ) -> tuple[cupy.ndarray, cupy.ndarray]:
        hidden, x = self.operator_norm.rounded(hidden, delta, is_routed=False)
        self._passed("operator_norm")
        delta = self.operator.of(x, batch, state)
        self._passed("operator")
        hidden, x = self.ffn_norm.rounded(hidden, delta, is_routed=self.is_routed)
        self._passed("ffn_norm")
        delta = self.feed_forward.of(x)
        if not self.is_routed:  # its parts are told
            self._passed("feed_forward")
        return hidden, delta
