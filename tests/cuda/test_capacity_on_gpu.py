"""What a real GPU has left, and that too little of it is an error before anything is loaded."""

from __future__ import annotations

import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.errors import Lfm2kitError
from tests.random_model import build_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

TAKEN = 64 << 20  # bytes


def test_what_is_free_falls_by_what_is_taken_and_comes_back() -> None:
    import cupy
    from lfm2kit_cuda.memory import memory_of

    memory = memory_of(0)
    before = memory.free_bytes()
    array = cupy.empty(TAKEN, cupy.uint8)
    assert before - memory.free_bytes() >= TAKEN
    del array
    assert before - memory.free_bytes() < TAKEN


@pytest.mark.parametrize("plan", ["cuda", "hybrid"])
def test_too_little_is_an_error_that_says_what_would_fit(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2kit_cuda.memory import CudaMemory

    monkeypatch.setattr(CudaMemory, "free_bytes", lambda self: 10_000_000)
    with pytest.raises(
        Lfm2kitError, match=r"memory 'lfm2kit_cuda:0' is too small.*n_cpu_moe=[1-6]$"
    ):
        build_random(plan)
