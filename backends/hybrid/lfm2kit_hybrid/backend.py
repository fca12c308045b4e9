"""Gives each spec to one of two other backends: a router's choice to the CPU, the rest to the GPU.

Where a block's arrays then cross between memories is the core's business: it asks where each block
lives.  How they cross is this backend's: it has threads that the GPU's work can call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from lfm2kit.backend import (
    F32,
    HOST,
    Backend,
    Block,
    BuildsAround,
    BuildsOperators,
    Captures,
    Context,
    Crossing,
    Format,
    KeepsFormats,
    Measures,
    Memory,
    MemoryFigures,
    Near,
    PinsMemory,
    ReadsRows,
    Room,
    Signals,
    Spec,
    Weights,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import is_ordered
from lfm2kit.specs import MLP, Choice, Experts, LMHead, Router, Scores, SparseMoe, leaves
from lfm2kit_hybrid.cores import block_threads, core_notes, workers_cores

if TYPE_CHECKING:
    from lfm2kit_hybrid.server import Outer, Server

GPU, CPU = "cuda", "cpu_simd"
CROSSED = (Choice, Experts, LMHead, MLP, Router, Scores, SparseMoe)  # arrays in, arrays out


class HybridBackend:
    def __init__(self, context: Context) -> None:
        self._cpu = context.create_backend(CPU)
        self._is_quiet = context.local_rank > 0  # one rank of each machine prints that it compiles
        self._notes: list[str] = []
        self._gpu = self._gpu_or_cpu(context)
        self._ranks = context.local_rank, context.local_ranks
        self._servers: dict[str, Server] = {}  # by the name of the memory that they serve
        if isinstance(self._gpu, Captures):
            self.capture = self._gpu.capture
        if isinstance(self._gpu, Measures):
            self.ceilings = self._gpu.ceilings

    def why_unsupported(self, spec: Spec) -> str | None:
        if not isinstance(spec, Choice) and any(isinstance(s, Choice) for s in leaves(spec)):
            return "it builds the choice of experts apart from the rest, to route on the CPU"
        return self._backend_of(spec).why_unsupported(spec)

    def memory(self, spec: Spec) -> Memory:
        return self._backend_of(spec).memory(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        return self._backend_of(spec).build(spec, weights)

    def why_not_around(self, spec: Spec, parts: Sequence[str]) -> str | None:
        if not isinstance(self._gpu, BuildsAround):
            return f"backend '{GPU}' is not installed"
        return self._gpu.why_not_around(spec, parts)

    def build_around(self, spec: Spec, weights: Weights, parts: Mapping[str, Block]) -> Block:
        assert isinstance(self._gpu, BuildsAround)
        return self._gpu.build_around(spec, weights, parts)

    def why_not_crossed(self, spec: Spec, memory: Memory, outer: Memory) -> str | None:
        if memory.name != HOST.name:
            return "only blocks in the host's memory are called"
        if not isinstance(outer, Signals) or not is_ordered(outer):
            return f"memory {outer.name!r} cannot call threads of the host"
        return None if type(spec) in CROSSED else "only blocks of arrays are called"

    def crossing(
        self, name: str, spec: Spec, block: Block, memory: Memory, outer: Memory
    ) -> Crossing:
        server = self._server(cast("Outer", outer))
        if isinstance(spec, Experts) and len(spec.local_experts) < spec.num_experts:
            return server.crossing_for_ids(name, block, spec.local_experts)
        return server.crossing(name, block)

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        backend = self._backend_of(spec)
        return backend.kept_bytes(spec, weights) if isinstance(backend, MemoryFigures) else 0

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        backend = self._backend_of(spec)
        return backend.scratch_bytes(spec, tokens) if isinstance(backend, MemoryFigures) else 0

    def pinned_bytes(self, spec: Spec, weights: Weights) -> int:
        backend = self._backend_of(spec)
        return backend.pinned_bytes(spec, weights) if isinstance(backend, PinsMemory) else 0

    def state_bytes(self, spec: Spec, room: Room) -> int:
        backend = self._backend_of(spec)
        assert isinstance(backend, BuildsOperators)
        return backend.state_bytes(spec, room)

    def kept_formats(self, spec: Spec, weights: Weights) -> Mapping[str, Format]:
        backend = self._backend_of(spec)
        return backend.kept_formats(spec, weights) if isinstance(backend, KeepsFormats) else {}

    def row_format(self, spec: Spec) -> Format:
        backend = self._backend_of(spec)
        return backend.row_format(spec) if isinstance(backend, ReadsRows) else F32

    def notes(self) -> list[str]:
        return self._notes

    def _backend_of(self, spec: Spec) -> Backend:
        return self._cpu if isinstance(spec, Choice) else self._gpu

    def _server(self, outer: Outer) -> Server:
        """Return the threads that serve a memory; the first call compiles what they do."""
        if outer.name not in self._servers:
            from lfm2kit_cpu_simd.compiling import announced

            with announced(is_quiet=self._is_quiet):
                from lfm2kit_hybrid.server import Server
            near = outer.near_cores() if isinstance(outer, Near) else ()
            cores, threads = workers_cores(*self._ranks, near), block_threads(self._ranks[1])
            self._servers[outer.name] = Server(outer, cores, threads)
        return self._servers[outer.name]

    def _gpu_or_cpu(self, context: Context) -> Backend:
        try:
            gpu = context.create_backend(GPU)
            self._notes += core_notes(context.local_ranks)
            return gpu
        except Lfm2kitError as error:
            self._notes.append(f"its GPU blocks run on {CPU}: {error}")
            return self._cpu
