"""Reads the limits that Linux control groups, versions 1 and 2, set for this process.

A group's limit also holds for the groups inside it, so all groups around this process's own are
read.  `root` is the file system to look in.  A system without control groups sets no limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lfm2kit.outputs.disk import mounts

UNLIMITED = 2**60  # version 1 writes the largest multiple of a page below 2**63
RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")  # of memory.stat, in version 2


class MemoryLimit(NamedTuple):
    """A group's limit and what is left of it, in bytes; file pages count as free."""

    name: str  # of the file that sets it
    limit: int
    free: int


def memory_limits(root: Path = Path("/")) -> Iterator[MemoryLimit]:
    """Yield the limits of all groups that this process is in, the innermost group first."""
    for folder in _folders("memory", root):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None and most < UNLIMITED:
                free = most - max(0, used - _reclaimable(folder))
                yield MemoryLimit(limit, most, max(0, free))


def processors(root: Path = Path("/")) -> float | None:
    """Return how many processors the tightest group allows; None if no group sets a limit.

    The number may be a fraction.
    """
    shares = [s for folder in _folders("cpu", root) if (s := _share(folder)) is not None]
    return min(shares, default=None)


def _share(folder: Path) -> float | None:
    quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    if not period:
        quota = _read(folder / "cpu.cfs_quota_us") or ""
        period = _read(folder / "cpu.cfs_period_us") or ""
    if not (quota.isdigit() and period.isdigit()):  # "max" in version 2, -1 in version 1
        return None
    return int(quota) / int(period)


def _reclaimable(folder: Path) -> int:
    """Return the bytes that the kernel reclaims before it refuses more."""
    lines = [line.split() for line in (_read(folder / "memory.stat") or "").splitlines()]
    stat = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}
    return sum(stat.get(f"total_{key}", stat.get(key, 0)) for key in RECLAIMABLE)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's group and of the groups around it."""
    for mounted, inside, mount in _mounts(controller, root):
        for group in _groups(controller if mounted == "cgroup" else "", root):
            # A container may see its own group as the root of what is mounted.
            below = group.removeprefix(inside.rstrip("/")) if group.startswith(inside) else ""
            folder = mount / below.strip("/")
            if ".." in below or not folder.is_dir():
                folder = mount
            yield folder
            yield from (p for p in folder.parents if p == mount or mount in p.parents)


def _groups(controller: str, root: Path) -> Iterator[str]:
    """Yield this process's group in a controller's hierarchy; version 2's controller is ""."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            yield group


def _mounts(controller: str, root: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield (type, first group, folder) of each mounted hierarchy that may have the controller."""
    for mount in mounts(root):
        options = mount.options.split(",")
        if mount.kind == "cgroup2" or (mount.kind == "cgroup" and controller in options):
            yield mount.kind, mount.inside, root / mount.point.lstrip("/")


def _number(path: Path) -> int | None:
    text = _read(path) or ""
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
