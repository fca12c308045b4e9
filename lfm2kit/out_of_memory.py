"""Memory that runs out all the same becomes a sentence: which block, how many bytes, what to do.

What is said in advance (`lfm2kit.capacity`) is the least that a model needs; others may take what
is left, and a system may refuse earlier than it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from traceback import walk_tb
from typing import Any, TypeVar

from lfm2kit.capacity import size
from lfm2kit.errors import Lfm2kitError
from lfm2kit.placement import Placed
from lfm2kit.weights import Weights

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def building(placed: Placed, weights: Weights) -> Iterator[None]:
    """While the block of `placed` is built of `weights`."""
    try:
        yield
    except MemoryError as error:
        stored = size(sum(weights[name].nbytes for name in placed.spec.parameters()))
        raise Lfm2kitError(
            f"there is not enough memory to build {placed.name}, whose weights take {stored} as "
            f"stored{_said(error)}; lfm2kit plan shows what every block takes"
        ) from None


def in_a_forward(logits: F) -> F:
    """Decorates `LFM2.logits(batch, ...)`."""

    @wraps(logits)
    def told(model: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return logits(model, batch, *arguments, **options)
        except MemoryError as error:
            layer = _layer_of(error, getattr(model.forward, "layers", []))
            raise Lfm2kitError(
                f"there is not enough memory for {batch.tokens} tokens at once{layer}"
                f"{_said(error)}; try a smaller batch, or shorter samples"
            ) from None

    return told  # type: ignore[return-value]


def _layer_of(error: MemoryError, layers: list[Any]) -> str:
    """The layer that the error passed through on its way up."""
    passed = {id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__)}
    return next((f" in layers.{i}" for i, layer in enumerate(layers) if id(layer) in passed), "")


def _said(error: MemoryError) -> str:
    """NumPy and CuPy say how many bytes they wanted; Python itself says nothing."""
    return f" ({error})" if str(error) else ""
