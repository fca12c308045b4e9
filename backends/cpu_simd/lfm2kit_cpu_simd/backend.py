"""Builds the SIMD blocks: one class per spec, found in one table.

Kernels are compiled where they stand, when their module is imported: that happens with the first
block that is built, and not before.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lfm2kit import specs
from lfm2kit.backend import (
    BF16,
    F16,
    HOST,
    Block,
    Ceilings,
    Context,
    Format,
    Memory,
    Room,
    Spec,
    Weights,
)
from lfm2kit.engine.drawing import Sampler
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit_cpu_simd import sizes
from lfm2kit_cpu_simd.compiling import announced
from lfm2kit_cpu_simd.crew import set_threads
from lfm2kit_cpu_simd.machine import STORAGES
from lfm2kit_cpu_simd.threads import threading_notes

# The module of each spec's class, which has the spec's name.
BLOCKS = {
    specs.Embedding: "blocks.rows",
    specs.RMSNorm: "blocks.rows",
    specs.ShortConv: "blocks.short_conv",
    specs.Attention: "blocks.attention",
    specs.MLP: "blocks.feed_forward",
    specs.Scores: "blocks.router",
    specs.Choice: "blocks.router",
    specs.Router: "blocks.router",
    specs.Experts: "blocks.feed_forward",
    specs.SparseMoe: "blocks.feed_forward",
    specs.LastRows: "blocks.rows",
    specs.LMHead: "blocks.rows",
}

MODULES = sorted({*BLOCKS.values(), "ceilings", "sampling"})

# The format that matrices are rounded to; in fp32 they stay as the checkpoint has them.
ROUNDED_TO: dict[str, Format | None] = {"fp32": None, "bf16": BF16, "fp16": F16}


class CpuSimdBackend:
    def __init__(self, context: Context) -> None:
        set_threads(context)
        self._is_quiet = context.local_rank > 0  # one rank of each machine prints that it compiles
        self._format = ROUNDED_TO[context.precision]
        if self._format not in (None, *STORAGES):
            raise Lfm2kitError(
                Option("precision", context.precision),
                f": this CPU cannot widen {self._format}; try ",
                Option("precision", "bf16"),
            )

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "it builds blocks up to SparseMoe"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        module = self._compiled(BLOCKS[type(spec)])
        block: Block = getattr(module, type(spec).__name__)(spec, weights, self._format)
        return block

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return sizes.kept_bytes(spec, weights, self._format)

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        return sizes.kept_formats(spec, weights, self._format)

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return sizes.scratch_bytes(spec, tokens)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        return sizes.state_bytes(spec, room)

    def notes(self) -> list[str]:
        return threading_notes()

    def ceilings(self) -> Ceilings:
        ceilings = self._compiled("ceilings")
        return Ceilings(ceilings.flops_per_second(), ceilings.bytes_per_second())

    def sampler(self) -> Sampler:
        sampler: Sampler = self._compiled("sampling").Sampler()
        return sampler

    def _compiled(self, module: str) -> ModuleType:
        """Return a module with its kernels; the first call compiles those of all modules."""
        with announced(is_quiet=self._is_quiet):
            modules = {name: import_module(f"lfm2kit_cpu_simd.{name}") for name in MODULES}
        return modules[module]
