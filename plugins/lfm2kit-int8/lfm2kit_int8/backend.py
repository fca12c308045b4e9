"""Builds feed-forwards whose matrices are kept in int8, and says what they take."""

from __future__ import annotations

from importlib import import_module

from lfm2kit_cpu_simd.compiling import announced
from lfm2kit_cpu_simd.crew import set_threads

from lfm2kit.backend import HOST, Block, Context, Format, Memory, Spec, Weights
from lfm2kit.specs import MLP, Experts
from lfm2kit_int8.formats import I8
from lfm2kit_int8.packing import packed_bytes


class Int8Backend:
    def __init__(self, context: Context) -> None:
        set_threads(context)
        self._is_quiet = context.local_rank > 0  # one rank of each machine prints that it compiles

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, MLP | Experts) else "it builds MLP and Experts"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        """Build a block; the first one compiles the kernels, unless they are kept."""
        with announced(is_quiet=self._is_quiet):
            blocks = import_module("lfm2kit_int8.feed_forward")
        block: Block = getattr(blocks, type(spec).__name__)(spec, weights)
        return block

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        return dict.fromkeys(spec.parameters(), I8)

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        hidden, inner, count = _sizes(spec)
        return count * (packed_bytes(inner, hidden, parts=2) + packed_bytes(hidden, inner, parts=1))

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        """Return the bytes between the products, and of experts' products before they are added."""
        if isinstance(spec, Experts):
            pairs = tokens * spec.num_experts_per_tok
            return 4 * pairs * (spec.intermediate_size + spec.hidden_size)
        return 4 * tokens * _sizes(spec)[1]


def _sizes(spec: Spec) -> tuple[int, int, int]:
    """Return the widths of a block, and how many feed-forwards it has."""
    assert isinstance(spec, MLP | Experts)
    count = len(spec.local_experts) if isinstance(spec, Experts) else 1
    return spec.hidden_size, spec.intermediate_size, count
