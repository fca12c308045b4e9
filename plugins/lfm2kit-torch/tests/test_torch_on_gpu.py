"""The conformance suite on `torch-cuda`, and what it shares with `cuda`: memory and streams."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed; pip install torch")
pytest.importorskip("lfm2kit_torch", reason="the plugin is not installed")

import torch
from lfm2kit_torch import lfm2kit_backends

import lfm2kit
import lfm2kit.testing
from lfm2kit.backend import Context
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.specs import MLP
from lfm2kit.testing.random_weights import random_weights

if TYPE_CHECKING:
    from lfm2kit_torch.gpu import Gpu

_, PLUGIN = lfm2kit_backends()
WHY_NOT = PLUGIN.why_unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


@lfm2kit.testing.parametrize_backend_checks("torch-cuda")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@cache
def backend() -> Any:
    return installed_plugins().creator(Context())("torch-cuda")


@pytest.fixture
def gpu() -> Gpu:
    from lfm2kit_torch.gpu import Gpu

    return Gpu(Context(create_backend=installed_plugins().creator(Context())))


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_arrays_and_tensors_share_their_memory(gpu: Gpu) -> None:
    array = gpu.memory.from_host(np.arange(6, dtype=np.float32).reshape(2, 3))
    with gpu.computing():
        tensor = gpu.tensor(array)
        again = gpu.array(tensor)
    assert array.data.ptr == tensor.data_ptr() == again.data.ptr
    np.testing.assert_array_equal(gpu.memory.to_host(again), np.arange(6).reshape(2, 3))


def test_work_is_enqueued_in_the_memorys_current_stream(gpu: Gpu) -> None:
    import cupy

    for _ in range(2):  # outside of the memory's streams as well, where it is the default stream
        with gpu.computing():
            here = cupy.cuda.get_current_stream(gpu.memory.device).ptr
            assert torch.cuda.current_stream(gpu.memory.device).cuda_stream == here
        with gpu.memory.stream(), gpu.computing():
            here = cupy.cuda.get_current_stream(gpu.memory.device).ptr
            assert here
            assert torch.cuda.current_stream().cuda_stream == here


@pytest.mark.usefixtures("_as_it_was")
def test_tf32_is_refused() -> None:
    memory = backend().memory(MLP(8, 8))
    block = backend().build(MLP(8, 8), random_weights(MLP(8, 8)))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(lfm2kit.Lfm2kitError, match="fp32_precision is 'tf32'"):
        block(memory.from_host(np.ones((3, 8), np.float32)))


@pytest.mark.parametrize("part", ["moe", "operator", "norm", "experts", "head"])
def test_it_works_between_the_kernels_of_cuda_and_is_never_replayed(part: str) -> None:
    with warnings.catch_warnings(record=True, action="always") as told:
        mixed = lfm2kit.load_model("tiny", f"cuda,{part}=torch-cuda")
    assert any("not captured: torch-cuda builds" in str(one.message) for one in told)
    assert not mixed.is_captured
    assert not mixed.placed.copies()
    reference = lfm2kit.load_model("tiny", "reference")
    for ids in ([[11, 22, 33], [44, 55]], [[66, 77, 88], [99, 11]], [[1, 2, 3], [4, 5]]):
        batch = lfm2kit.Batch.of_sequences(ids)
        np.testing.assert_allclose(mixed.logits(batch), reference.logits(batch), atol=1e-3)
