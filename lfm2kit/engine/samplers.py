"""Who draws the tokens of a model: the backend of its head, or NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lfm2kit.backend import Backend, Samples
from lfm2kit.building.placement import Placed
from lfm2kit.engine.drawing import NumPySampler, Sampler
from lfm2kit.memory import HOST
from lfm2kit.plugin_faults import blaming
from lfm2kit.specs import LMHead


def sampler_for(placed: Placed, create: Callable[[str], Backend]) -> Callable[[], Sampler]:
    """Return what makes a sampler for a model's logits, which are in the host's memory.

    A backend whose head is in another memory draws there, and so not from these.
    """
    for leaf in placed.leaves():
        if isinstance(leaf.spec, LMHead) and leaf.backend and leaf.memory.name == HOST.name:
            return partial(sampler_of, leaf.backend, create(leaf.backend))
    return NumPySampler


def sampler_of(name: str, backend: Backend) -> Sampler:
    """Return the sampler of the backend `name`, which computes the logits, or NumPy's.

    NumPy's takes logits of the host's memory.  Raise `Lfm2kitError` if the backend raises.
    """
    if not isinstance(backend, Samples):
        return NumPySampler()
    with blaming(f"sampler of backend '{name}'"):
        return backend.sampler()
