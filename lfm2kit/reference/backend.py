"""Builds the reference blocks: one class per spec, found in one table."""

from __future__ import annotations

import math

from lfm2kit import specs
from lfm2kit.backend import HOST, Block, Format, Memory, Spec, Weights
from lfm2kit.reference.attention import Attention
from lfm2kit.reference.feed_forward import MLP, Experts, Router
from lfm2kit.reference.rows import Embedding, LastRows, LMHead, RMSNorm
from lfm2kit.reference.short_conv import ShortConv

BLOCKS = {
    specs.Embedding: Embedding,
    specs.RMSNorm: RMSNorm,
    specs.ShortConv: ShortConv,
    specs.Attention: Attention,
    specs.MLP: MLP,
    specs.Router: Router,
    specs.Experts: Experts,
    specs.LastRows: LastRows,
    specs.LMHead: LMHead,
}


class ReferenceBackend:
    """A backend without precision, threads or state of its own: nothing to configure."""

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "reference builds only the smallest blocks"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        block: Block = BLOCKS[type(spec)](spec, weights)
        return block

    def workspace_bytes(self, spec: Spec, weights: Weights, tokens: int) -> int:
        """A convolution's taps in float64, and in a call one matrix after the other.

        All else stays a view of the checkpoint.
        """
        shapes = spec.parameters().values()
        kept = 8 * sum(math.prod(shape) for shape in shapes if len(shape) == 3)
        if isinstance(spec, specs.Embedding) or tokens == 0:
            return kept
        return kept + 8 * max((math.prod(shape) for shape in shapes), default=0)

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """Every weight stays as it is stored; each call unpacks it."""
        return {name: weights[name].format for name in spec.parameters()}
