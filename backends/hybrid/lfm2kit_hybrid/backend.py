"""Gives each spec to one of two other backends: a router's choice to the CPU, the rest to the GPU.

That a choice's arrays then cross between memories is the core's business: it asks where each block
lives and puts the copies there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lfm2kit.backend import (
    Backend,
    Block,
    BuildsAround,
    BuildsOperators,
    Context,
    Format,
    KeepsFormats,
    Memory,
    MemoryFigures,
    Room,
    Spec,
    Weights,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit.specs import Choice, leaves

GPU, CPU = "cuda", "cpu_simd"


class HybridBackend:
    def __init__(self, context: Context) -> None:
        self._cpu = context.create_backend(CPU)
        self._notes: list[str] = []
        self._gpu = self._gpu_or_cpu(context)

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

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        backend = self._backend_of(spec)
        return backend.kept_bytes(spec, weights) if isinstance(backend, MemoryFigures) else 0

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        backend = self._backend_of(spec)
        return backend.scratch_bytes(spec, tokens) if isinstance(backend, MemoryFigures) else 0

    def state_bytes(self, spec: Spec, room: Room) -> int:
        backend = self._backend_of(spec)
        assert isinstance(backend, BuildsOperators)
        return backend.state_bytes(spec, room)

    def kept_formats(self, spec: Spec, weights: Weights) -> Mapping[str, Format]:
        backend = self._backend_of(spec)
        return backend.kept_formats(spec, weights) if isinstance(backend, KeepsFormats) else {}

    def notes(self) -> list[str]:
        return self._notes

    def _backend_of(self, spec: Spec) -> Backend:
        return self._cpu if isinstance(spec, Choice) else self._gpu

    def _gpu_or_cpu(self, context: Context) -> Backend:
        try:
            return context.create_backend(GPU)
        except Lfm2kitError as error:
            self._notes.append(f"its GPU blocks run on {CPU}: {error}")
            return self._cpu
