"""Builds feed-forwards whose matrices are kept in int8, and says what they take."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module

import numba

from lfm2kit.backend import HOST, Block, Context, Format, Memory, Spec, Weights
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.specs import MLP, Experts
from lfm2kit_int8.compiling import announced
from lfm2kit_int8.formats import I8
from lfm2kit_int8.packing import packed_bytes


class Int8Backend:
    def __init__(self, context: Context) -> None:
        most = numba.config.NUMBA_NUM_THREADS
        if context.threads is not None and context.threads > most:
            raise Lfm2kitError(
                Option("threads", context.threads),
                f": this process may use {most} (cores of its affinity mask, or NUMBA_NUM_THREADS)",
            )
        self._is_first = context.local_rank == 0  # one rank of each machine prints that it compiles
        self._most_threads = context.threads or max(1, most // context.local_ranks)

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, MLP | Experts) else "it builds MLP and Experts"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        """Build a block; the first one compiles the kernels, unless they are kept."""
        with announced() if self._is_first else nullcontext():
            blocks = import_module("lfm2kit_int8.feed_forward")
        block: Block = getattr(blocks, type(spec).__name__)(spec, weights, self._threads)
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

    def _threads(self) -> int:
        """Return how many threads a product has: no more than Numba now allows this thread.

        `cpu_simd` has it allow fewer while other processes want their cores.
        """
        return min(self._most_threads, int(numba.get_num_threads()))


def _sizes(spec: Spec) -> tuple[int, int, int]:
    """Return the widths of a block, and how many feed-forwards it has."""
    assert isinstance(spec, MLP | Experts)
    count = len(spec.local_experts) if isinstance(spec, Experts) else 1
    return spec.hidden_size, spec.intermediate_size, count
