"""Makes an NVTX range of each block's call: Nsight Systems shows blocks above their kernels.

LFM2KIT_TRACE_NVTX=1 nsys profile lfm2kit run --backend cuda
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import lfm2kit
from lfm2kit.backend import Block, Memory
from lfm2kit.specs import Spec

VARIABLE = "LFM2KIT_TRACE_NVTX"
GREY = 0x999999
COLOURS = {  # of kinds: parts have a shade of their whole's
    "model": 0x333333,
    "layer": 0x666666,
    "norm": 0xE69F00,
    "conv": 0x0072B2,
    "attn": 0x56B4E9,
    "mlp": 0x009E73,
    "moe": 0xD55E00,
    "router": 0xF0A070,
    "scores": 0xF0A070,
    "choice": 0xF0A070,
    "experts": 0xA04000,
    "embed": 0xCC79A7,
    "head": 0xCC79A7,
}


@lfm2kit.hookimpl
def lfm2kit_block_wrapper(name: str, spec: Spec, memory: Memory) -> lfm2kit.Wrapper | None:
    """Return a wrapper that makes ranges of a block's calls; None if nobody asks for them.

    It does not survive capture: a replay calls no block that could make a range.
    """
    if not _is_asked_for():
        return None
    return lfm2kit.Wrapper(lambda block: _ranged(block, name or "model", spec.kind))


def _is_asked_for() -> bool:
    """Return whether ranges are asked for.  Raise `Lfm2kitError` where they cannot be made."""
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return False
    if value != "1":
        raise lfm2kit.Lfm2kitError(f"{VARIABLE}={value}: write 1 for ranges, and 0 for none")
    if find_spec("nvtx") is None:
        raise lfm2kit.Lfm2kitError(
            f"{VARIABLE}=1: the package nvtx is not installed; pip install nvtx"
        )
    return True


def _ranged(block: Block, name: str, kind: str) -> Block:
    """Return a block whose calls are ranges of the thread that makes them."""
    import nvtx

    domain = nvtx.get_domain("lfm2kit")
    range_of_block = domain.get_event_attributes(name, COLOURS.get(kind, GREY), kind)

    def ranged(*inputs: Any) -> Any:
        domain.push_range(range_of_block)
        try:
            return block(*inputs)
        finally:
            domain.pop_range()

    return ranged
