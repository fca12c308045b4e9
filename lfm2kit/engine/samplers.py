"""Who draws the tokens of a model: the backend of its head, or NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lfm2kit.backend import Backend, Samples
from lfm2kit.building.placement import Placed
from lfm2kit.engine.drawing import NumPySampler, Sampler
from lfm2kit.memory import Memory
from lfm2kit.plugin_faults import blaming
from lfm2kit.specs import LMHead, leaves


def sampler_for(placed: Placed, create: Callable[[str], Backend]) -> Callable[[], Sampler]:
    """Return what makes a sampler for a model's logits, which are in the memory around it.

    A backend whose head is in another memory draws there, and so not from these.
    """
    home = placed.outer
    for leaf in placed.leaves():
        if _has_head(leaf) and leaf.backend and leaf.memory.name == home.name:
            return partial(sampler_of, leaf.backend, create(leaf.backend), home)
    return partial(NumPySampler, home)


def _has_head(leaf: Placed) -> bool:
    return any(isinstance(spec, LMHead) for spec in leaves(leaf.spec))


def sampler_of(name: str, backend: Backend, memory: Memory) -> Sampler:
    """Return the sampler of the backend `name`, which computes the logits in `memory`, or NumPy's.

    Raise `Lfm2kitError` if the backend raises.
    """
    if not isinstance(backend, Samples):
        return NumPySampler(memory)
    with blaming(f"sampler of backend '{name}'"):
        return backend.sampler()
