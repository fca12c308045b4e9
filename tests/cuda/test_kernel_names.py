"""Profilers show a kernel's name and not its source, so no two sources give the same one."""

from __future__ import annotations

import re
from collections import Counter

from lfm2kit_cuda.compiling import INCLUDE, SOURCES

KERNEL = re.compile(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)[\s\\]*)?([\w#]+)\(")
GIVEN = re.compile(r"^LINEAR\((\w+),", re.MULTILINE)  # to a macro whose kernel is called `name`


def test_a_profiler_can_tell_all_kernels_apart() -> None:
    files = sorted([*SOURCES.rglob("*.cu"), *INCLUDE.glob("*.cuh")])
    texts = [path.read_text(encoding="utf-8") for path in files]
    names = [name for text in texts for name in (*KERNEL.findall(text), *GIVEN.findall(text))]
    count = Counter(name for name in names if name != "name")
    assert [name for name, times in count.items() if times > 1] == []
    assert {"linear_simt", "linear_mma", "linear_wgmma", "attend", "add_norm"} <= set(count)
    assert count.total() == sum(text.count('extern "C" __global__') for text in texts) + 3
