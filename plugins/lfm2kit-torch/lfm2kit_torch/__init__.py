"""Announces the backends `torch` and `torch-cuda`.  Importing this does not import PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import lfm2kit
from lfm2kit.backend import Backend, BackendPlugin, Context, Promise

ROWS = "PyTorch's libraries choose a product's kernel by the number of rows"
SHARES = "it shares the memory of backend 'cuda'"


def _on_host(context: Context) -> Backend:
    from lfm2kit_torch.backend import TorchBackend
    from lfm2kit_torch.host import Host

    return TorchBackend(Host(context))


def _on_gpu(context: Context) -> Backend:
    from lfm2kit_torch.backend import TorchBackend
    from lfm2kit_torch.gpu import Gpu

    return TorchBackend(Gpu(context))


def _why_no_torch() -> str | None:
    return None if find_spec("torch") else "PyTorch is not installed; pip install torch"


def _why_no_gpu() -> str | None:
    """Return what is missing; whether PyTorch itself finds the GPU, `create` sees."""
    if reason := _why_no_torch():
        return reason
    if find_spec("lfm2kit_cuda") is None:
        return f"{SHARES}, which is not installed; pip install 'lfm2kit-torch[cuda13]'"
    from lfm2kit_cuda import lfm2kit_backends as backends_of_cuda

    (cuda,) = backends_of_cuda()
    reason = cuda.why_unavailable()
    return None if reason is None else f"{SHARES}, which cannot run here: {reason}"


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="torch",
        summary="every block in PyTorch on the CPU: for prototypes",
        create=_on_host,
        api_version=1,
        why_unavailable=_why_no_torch,
        not_promised={Promise.BATCH_INVARIANCE: ROWS},
    )
    yield BackendPlugin(
        name="torch-cuda",
        summary="every block in PyTorch on an NVIDIA GPU, in the memory of backend 'cuda'",
        create=_on_gpu,
        api_version=1,
        why_unavailable=_why_no_gpu,
        not_promised={Promise.BATCH_INVARIANCE: ROWS},
    )
