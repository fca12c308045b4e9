"""Weights with the values that a backend keeps of them, where it tells its formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lfm2kit.backend import Backend, KeepsFormats
from lfm2kit.formats import Format
from lfm2kit.specs import Spec
from lfm2kit.weights import Tensor, Weights


def as_kept(backend: Backend, spec: Spec, weights: Weights) -> Weights:
    """Return the weights of `spec`, rounded to the formats in which `backend` keeps them.

    What it does not build, or does not tell, stays as it is.
    """
    return Weights(dict(_kept(backend, spec, weights)))


def _kept(backend: Backend, spec: Spec, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    is_built = backend.why_unsupported(spec) is None
    if is_built or not spec.parts():
        formats = _told_formats(backend, spec, weights) if is_built else {}
        for name in spec.parameters():
            tensor = weights[name]
            yield name, tensor.stored_as(formats.get(name, tensor.format))
        return
    for part in spec.parts():
        prefix = f"{part.scope}." if part.scope else ""
        for name, tensor in _kept(backend, part.spec, weights.scope(part.scope)):
            yield prefix + name, tensor


def _told_formats(backend: Backend, spec: Spec, weights: Weights) -> Mapping[str, Format]:
    return backend.kept_formats(spec, weights) if isinstance(backend, KeepsFormats) else {}
