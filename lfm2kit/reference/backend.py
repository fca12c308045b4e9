"""Builds the reference blocks: one class per spec, found in one table."""

from __future__ import annotations

import math

from lfm2kit import specs
from lfm2kit.backend import HOST, Block, Format, Memory, Room, Spec, Weights
from lfm2kit.reference import attention, short_conv
from lfm2kit.reference.attention import Attention
from lfm2kit.reference.feed_forward import MLP, Choice, Experts, Router, Scores
from lfm2kit.reference.rows import Embedding, LastRows, LMHead, RMSNorm
from lfm2kit.reference.short_conv import ShortConv

BLOCKS = {
    specs.Embedding: Embedding,
    specs.RMSNorm: RMSNorm,
    specs.ShortConv: ShortConv,
    specs.Attention: Attention,
    specs.MLP: MLP,
    specs.Scores: Scores,
    specs.Choice: Choice,
    specs.Router: Router,
    specs.Experts: Experts,
    specs.LastRows: LastRows,
    specs.LMHead: LMHead,
}


class ReferenceBackend:
    """A backend without precision, threads or state of its own: nothing to configure."""

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "it builds blocks up to Router"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        block: Block = BLOCKS[type(spec)](spec, weights)
        return block

    def takes_padding(self, spec: Spec) -> bool:
        return True

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        """Return the bytes of a convolution's taps: all else stays a view of the checkpoint."""
        shapes = spec.parameters().values()
        return 8 * sum(math.prod(shape) for shape in shapes if len(shape) == 3)

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        """Return the bytes of the largest matrix: one after the other is widened in a call."""
        if isinstance(spec, specs.Embedding) or tokens == 0:
            return 0
        return 8 * max((math.prod(shape) for shape in spec.parameters().values()), default=0)

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """Return each weight's own format: it stays as it is stored, and each call unpacks it."""
        return {name: weights[name].format for name in spec.parameters()}

    def state_bytes(self, spec: Spec, room: Room) -> int:
        if isinstance(spec, specs.ShortConv):
            return short_conv.state_bytes(spec, room)
        assert isinstance(spec, specs.Attention)
        return attention.state_bytes(spec, room)
