"""A backend that rounds the matrices of its blocks, and may tell so."""

from __future__ import annotations

from lfm2kit.backend import F32, Block, Format, Spec, Weights
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing.kept_weights import as_kept


class RoundedBackend(ReferenceBackend):
    """The reference's blocks of matrices that are rounded to `format`, all but a router's."""

    def __init__(self, format: Format) -> None:
        self.format = format

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        shapes = spec.parameters().items()
        is_kept = {n: len(shape) != 2 or n.endswith("gate.weight") for n, shape in shapes}
        return {name: F32 if kept else self.format for name, kept in is_kept.items()}

    def build(self, spec: Spec, weights: Weights) -> Block:
        return super().build(spec, as_kept(self, spec, weights))


class SilentlyRounded(ReferenceBackend):
    """The same blocks, of a backend that does not tell."""

    def __init__(self, format: Format) -> None:
        self._telling = RoundedBackend(format)

    def build(self, spec: Spec, weights: Weights) -> Block:
        return self._telling.build(spec, weights)

    kept_formats = None  # type: ignore[assignment]
