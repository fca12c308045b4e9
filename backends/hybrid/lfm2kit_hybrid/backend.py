"""Gives each spec to one of two other backends.  That a router's arrays then cross between
memories is the core's business: it asks where each block lives and puts the copies there."""

from __future__ import annotations

from collections.abc import Mapping

from lfm2kit.backend import (
    Backend,
    Block,
    Context,
    Format,
    KeepsFormats,
    Memory,
    NeedsWorkspace,
    Spec,
    Weights,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit.specs import Router, leaves

GPU, CPU = "cuda", "cpu_simd"


class HybridBackend:
    def __init__(self, context: Context) -> None:
        self._cpu = context.create_backend(CPU)
        self._notes: list[str] = []
        self._gpu = self._gpu_or_cpu(context)

    def why_unsupported(self, spec: Spec) -> str | None:
        if not isinstance(spec, Router) and any(isinstance(s, Router) for s in leaves(spec)):
            return "it builds routers apart from the rest, to route on the CPU"
        return self._backend_of(spec).why_unsupported(spec)

    def memory(self, spec: Spec) -> Memory:
        return self._backend_of(spec).memory(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        return self._backend_of(spec).build(spec, weights)

    def workspace_bytes(self, spec: Spec, weights: Weights, tokens: int) -> int:
        backend = self._backend_of(spec)
        if not isinstance(backend, NeedsWorkspace):
            return 0
        return backend.workspace_bytes(spec, weights, tokens)

    def kept_formats(self, spec: Spec, weights: Weights) -> Mapping[str, Format]:
        backend = self._backend_of(spec)
        return backend.kept_formats(spec, weights) if isinstance(backend, KeepsFormats) else {}

    def notes(self) -> list[str]:
        return self._notes

    def _backend_of(self, spec: Spec) -> Backend:
        return self._cpu if isinstance(spec, Router) else self._gpu

    def _gpu_or_cpu(self, context: Context) -> Backend:
        try:
            return context.create_backend(GPU)
        except Lfm2kitError as error:
            self._notes.append(f"its GPU blocks run on {CPU}: {error}")
            return self._cpu
