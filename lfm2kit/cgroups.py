"""What the control groups of Linux, versions 1 and 2, let this process have of the machine.

A group's limit holds for the groups inside it as well, so the groups around this process's own are
asked, too.  `root` is the file system to look in; nothing is asked of a system without groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lfm2kit.disk import mounts

UNLIMITED = 2**60  # version 1 writes the largest multiple of a page below 2**63
RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")  # of memory.stat, in version 2


class MemoryLimit(NamedTuple):
    """A group's limit, and what is left of it once pages of files are given back; in bytes."""

    name: str  # of the file that sets it
    limit: int
    free: int


def memory_limits(root: Path = Path("/")) -> Iterator[MemoryLimit]:
    """The limits of all groups that this process is in, the innermost group first."""
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
    """The processors that the tightest group allows, perhaps a fraction; None without a limit."""
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
    """Bytes that the kernel takes back before it refuses more: version 1 sums up `total_*`."""
    lines = [line.split() for line in (_read(folder / "memory.stat") or "").splitlines()]
    stat = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}
    return sum(stat.get(f"total_{key}", stat.get(key, 0)) for key in RECLAIMABLE)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's group and of those around it, in each version's hierarchy."""
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
    """This process's group in the hierarchy of a controller; "" is version 2's, which has all."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            yield group


def _mounts(controller: str, root: Path) -> Iterator[tuple[str, str, Path]]:
    """(type, the group that it begins at, folder) of the hierarchies that may have a controller."""
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
