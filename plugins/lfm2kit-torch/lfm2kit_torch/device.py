"""What the backend needs of a place where PyTorch computes: the `Host` or a `Gpu`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from lfm2kit.backend import Array, Memory


class Device(Protocol):
    @property
    def memory(self) -> Memory: ...

    @property
    def copies_weights(self) -> bool:
        """Return whether a weight leaves the checkpoint's own memory."""
        ...

    def building(self) -> AbstractContextManager[None]:
        """Return a context for building blocks and making states.

        When it is left, all that was made in it is ready for every thread and stream.
        """
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Return a context for a block's call: in float32, with nothing kept for a gradient."""
        ...

    def weight(self, data: Array) -> torch.Tensor:
        """Return a tensor of a NumPy array that is never written."""
        ...

    def tensor(self, array: Array) -> torch.Tensor:
        """Return a tensor that shares the memory of an array of `memory`."""
        ...

    def array(self, tensor: torch.Tensor) -> Array:
        """Return an array of `memory` that shares the memory of a tensor."""
        ...

    def why_not_captured(self) -> str | None:
        """Return why calls cannot be part of a captured forward; None if nothing captures here."""
        ...

    def notes(self) -> list[str]: ...
