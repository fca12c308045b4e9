"""What blocks say that they take, against CuPy's pool on a real GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit import specs
from lfm2kit.backend import Context
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.testing.cases import CASES, REAL_WIDTHS, experts
from lfm2kit.testing.compare import each
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

ROUTER = specs.Router(2048, 32, 4, True, True, 1.0)
SPECS = (
    *REAL_WIDTHS,
    experts(2048, 1792, 8, 4),
    specs.LMHead(4096, 2048),
    specs.Embedding(4096, 2048),
    specs.LastRows(2048),
    *(layer for layer in CASES["layer"][4:]),
)
SLACK = 1 << 20  # bytes: what the pool rounds up, and small arrays


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_figures_are_what_the_pool_gives(spec: Any, precision: str) -> None:
    import cupy

    backend: Any = installed_plugins().creator(Context(precision=precision))("cuda")
    if backend.why_unsupported(spec) is not None:
        pytest.skip("it is joined of parts")
    pool, weights = cupy.cuda.MemoryPool(), random_weights(spec)
    with cupy.cuda.using_allocator(pool.malloc):
        block = HostBlock(spec, backend.build(spec, weights), backend.memory(spec))
    kept = backend.kept_bytes(spec, weights)
    assert kept <= pool.used_bytes() <= 1.05 * kept + SLACK
    for tokens in (16, 300, 2048):
        inputs = block.to_memory(random_inputs(spec, np.random.default_rng(0), tokens))
        block.block(*inputs)  # compiles
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            result = block.block(*inputs)
        scratch, peak = backend.scratch_bytes(spec, tokens), pool.total_bytes()
        results = sum(array.nbytes for array in each(result))
        assert scratch <= peak
        assert peak <= 1.5 * (scratch + results) + SLACK, (tokens, scratch, results, peak)
        del result
