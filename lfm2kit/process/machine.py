"""Finds out how much memory and how many cores this process may use, whatever limits them."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lfm2kit.process import cgroups

RLIMITS = {  # the shell's name of each, and the field of /proc/self/status that counts towards it
    "ulimit -v": (resource.RLIMIT_AS, "VmSize"),
    "ulimit -d": (resource.RLIMIT_DATA, "VmData"),
}


class Limit(NamedTuple):
    """A limit on the memory of this process, in bytes."""

    name: str
    limit: int
    free: int  # what is left of it; file pages count as free, because they can be reclaimed
    is_shared: bool  # with the other processes of this machine, or of a container

    def left(self, ranks: int) -> int:
        """Return the bytes that each of `ranks` such processes on this machine can still take."""
        return self.free // ranks if self.is_shared else self.free


def memory_limits(root: Path = Path("/")) -> Iterator[Limit]:
    """Yield all limits on this process's memory: the machine, control groups, ulimit."""
    yield _physical(root)
    for name, limit, free in cgroups.memory_limits(root):
        yield Limit(f"cgroup {name}", limit, free, is_shared=True)
    used = _kilobytes(root / "proc/self/status")
    for name, (what, counted) in RLIMITS.items():
        limit, _ = resource.getrlimit(what)
        if limit != resource.RLIM_INFINITY:
            free = max(0, limit - 1024 * used.get(counted, 0))
            yield Limit(name, limit, free, is_shared=False)


def free_memory(ranks: int = 1, root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take if `ranks` such processes run here."""
    return min(limit.left(ranks) for limit in memory_limits(root))


def tightest_limit(root: Path = Path("/")) -> Limit:
    """Return the limit that leaves this process the least memory."""
    return min(memory_limits(root), key=lambda limit: limit.free)


def cores(root: Path = Path("/")) -> int:
    """Return how many threads can run at once: the affinity mask's cores, or a group's quota.

    A quota is rounded up: one thread too many computes more than one too few.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    there = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cgroups.processors(root)
    return there if quota is None else max(1, min(there, math.ceil(quota)))


def _physical(root: Path) -> Limit:
    """Return the machine's memory without swap: with weights there, a token would take minutes."""
    there = _kilobytes(root / "proc/meminfo")
    if "MemTotal" not in there:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Limit("memory of this machine", total, total, is_shared=True)
    total = 1024 * there["MemTotal"]
    free = 1024 * there.get("MemAvailable", there["MemTotal"])
    return Limit("memory of this machine", total, free, is_shared=True)


def _kilobytes(path: Path) -> dict[str, int]:
    """Return the numbers in a file that has lines such as `MemTotal:   24684092 kB`."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {key: int(text.removesuffix(" kB")) for key, _, text in pairs}
