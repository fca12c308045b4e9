"""An NVIDIA GPU: tensors and the CuPy arrays of backend `cuda` share memory and streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import cupy
import torch

from lfm2kit import specs
from lfm2kit.backend import Array, Context
from lfm2kit.errors import Lfm2kitError
from lfm2kit_torch.exact import in_float32

if TYPE_CHECKING:
    from lfm2kit_cuda.memory import CudaMemory

ANY = specs.LMHead(vocab_size=1, hidden_size=1)  # `cuda` has one memory for all specs


class Gpu:
    copies_weights = True

    def __init__(self, context: Context) -> None:
        if not torch.cuda.is_available():
            raise Lfm2kitError(
                f"PyTorch {torch.__version__} finds no GPU; install one that is built for CUDA, "
                "see https://pytorch.org/get-started"
            )
        self.memory = cast("CudaMemory", context.create_backend("cuda").memory(ANY))

    @contextmanager
    def building(self) -> Iterator[None]:
        with self.memory.stream(), self.computing():
            yield
            torch.cuda.current_stream().synchronize()  # any stream may use what was made

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in the memory's current stream, so that neither library waits for the other."""
        with torch.cuda.stream(self._current_stream()), in_float32("cuda"):
            yield

    def weight(self, data: Array) -> torch.Tensor:
        return self.tensor(self.memory.from_host(data))

    def tensor(self, array: Array) -> torch.Tensor:
        return torch.from_dlpack(array)

    def array(self, tensor: torch.Tensor) -> Array:
        return cupy.from_dlpack(tensor)

    def why_not_captured(self) -> str | None:
        return "PyTorch's memory is not the graph's, and the host reads how many rows an expert has"

    def notes(self) -> list[str]:
        return [f"PyTorch {torch.__version__} keeps memory of the GPU in a pool of its own"]

    def _current_stream(self) -> torch.cuda.Stream:
        number = self.memory.device
        if pointer := cupy.cuda.get_current_stream(number).ptr:
            return torch.cuda.ExternalStream(pointer, device=number)
        return torch.cuda.default_stream(number)  # 0 would be a new stream
