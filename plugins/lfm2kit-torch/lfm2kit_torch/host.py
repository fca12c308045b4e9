"""The CPU: tensors and NumPy arrays share their memory."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch

from lfm2kit.backend import HOST, Array, Context
from lfm2kit.process.machine import cores
from lfm2kit_torch.exact import in_float32


class Host:
    memory = HOST
    copies_weights = False

    def __init__(self, context: Context) -> None:
        """Set PyTorch's number of threads, which is the process's, if it is asked for.

        Ranks that share a machine divide its cores, or those that a container may use.
        """
        if context.threads is not None:
            torch.set_num_threads(context.threads)
        elif context.local_ranks > 1:
            torch.set_num_threads(max(1, cores() // context.local_ranks))

    def building(self) -> AbstractContextManager[None]:
        return in_float32("cpu")

    def computing(self) -> AbstractContextManager[None]:
        return in_float32("cpu")

    def weight(self, data: Array) -> torch.Tensor:
        """Return a tensor in the checkpoint's own memory, if the data are aligned there."""
        return self.tensor(np.require(data, requirements=("C", "A")))

    def tensor(self, array: Array) -> torch.Tensor:
        return torch.from_dlpack(array)  # `from_numpy` warns of arrays that are read-only

    def array(self, tensor: torch.Tensor) -> Array:
        return tensor.numpy()

    def why_not_captured(self) -> str | None:
        return None

    def notes(self) -> list[str]:
        threads = torch.get_num_threads()
        return [f"PyTorch {torch.__version__}, threads of its own: {threads}"]
