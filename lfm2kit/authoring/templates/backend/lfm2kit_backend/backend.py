"""Says which blocks the backend builds; the plan takes the others from another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lfm2kit import specs
from lfm2kit.backend import HOST, Block, Context, Memory, Spec, Weights

from .feed_forward import MLP, Experts

# Both `why_unsupported` and `build` look here, so that they cannot differ.
BLOCKS: dict[type[Spec], Callable[[Any, Weights], Block]] = {
    specs.MLP: MLP,
    specs.Experts: Experts,
}


class NumPyBackend:
    def __init__(self, context: Context) -> None:
        self.context = context  # precision and threads that are asked for

    def why_unsupported(self, spec: Spec) -> str | None:
        """Return why a block is not built, such as a size; None if it is."""
        if type(spec) in BLOCKS:
            return None
        return f"it builds {' and '.join(known.__name__ for known in BLOCKS)}"

    def memory(self, spec: Spec) -> Memory:
        """Return where a block's arrays are: those in `HOST` are NumPy's."""
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        return BLOCKS[type(spec)](spec, weights)

    def notes(self) -> list[str]:
        """Return what users should know, such as an option without effect."""
        if self.context.threads is None:
            return []
        return ["NumPy decides itself how many threads it uses"]
