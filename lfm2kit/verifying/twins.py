"""The other side of a comparison: blocks of the same specs, called with host arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lfm2kit.backend import Backend, Block
from lfm2kit.memory import HOST
from lfm2kit.model import JOINS
from lfm2kit.rewrites.parted_experts import SplitExperts, StreamedExperts
from lfm2kit.specs import Spec
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.weights import Weights

Around = Callable[[str, Spec, Block], Block]


def as_it_is(name: str, spec: Spec, block: Block) -> Block:
    return block


def twin(
    backend: Backend, name: str, spec: Spec, weights: Weights, around: Around = as_it_is
) -> Block:
    """Return the block called `name`, built by `backend` whole or joined of its parts.

    It takes and returns host arrays.  `around` is put around it and every part.  The backend builds
    one or the other: `why_not_built(backend, whole(spec))` is None.
    """
    spec = whole(spec)
    if backend.why_unsupported(spec) is None:
        block: Block = HostBlock(spec, backend.build(spec, weights), backend.memory(spec))
        return around(name, spec, block)
    parts: dict[str, Any] = {
        part.role: twin(
            backend, f"{name}.{part.role}", part.spec, weights.scope(part.scope), around
        )
        for part in spec.parts()
    }
    return around(name, spec, JOINS[type(spec)](HOST).make(spec, **parts))


def copied(value: Any) -> Any:
    """Return a copy of an array, which a norm may write to; other values as they are."""
    return value.copy() if isinstance(value, np.ndarray) else value


def whole(spec: Spec) -> Spec:
    """Return the spec with the same results whose experts all lie in one place."""
    return spec.experts if isinstance(spec, SplitExperts | StreamedExperts) else spec
