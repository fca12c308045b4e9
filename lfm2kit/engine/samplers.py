"""Who draws the tokens of a model: the backend of its head, or NumPy."""

from __future__ import annotations

from lfm2kit.backend import Backend, Samples
from lfm2kit.engine.drawing import NumPySampler, Sampler
from lfm2kit.plugin_faults import blaming


def sampler_of(name: str, backend: Backend) -> Sampler:
    """Return the sampler of the backend `name`, which computes the logits, or NumPy's.

    NumPy's takes logits of the host's memory.  Raise `Lfm2kitError` if the backend raises.
    """
    if not isinstance(backend, Samples):
        return NumPySampler()
    with blaming(f"sampler of backend '{name}'"):
        return backend.sampler()
