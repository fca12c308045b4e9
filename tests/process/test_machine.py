"""What limits this process: control groups of both versions, ulimit, and who shares the memory."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from lfm2kit.process import cgroups, machine

MB = 2**20
V2 = "30 23 0:26 {inside} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1 = (
    "35 31 0:32 {inside} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 {inside} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
)
MEMORY_V2 = {
    "memory.max": 250 * MB,
    "memory.high": "max",
    "memory.current": 200 * MB,
    "memory.stat": f"anon {50 * MB}\nactive_file {40 * MB}\ninactive_file {60 * MB}\nfile_dirty 0",
}
MEMORY_V1 = {
    "memory.limit_in_bytes": 250 * MB,
    "memory.usage_in_bytes": 200 * MB,
    "memory.stat": f"inactive_file 7\ntotal_active_file {40 * MB}\ntotal_inactive_file {60 * MB}",
}


def system(root: Path, mounts: str, groups: str, files: Mapping[str, Mapping[str, object]]) -> Path:
    """Make a file system with the files of /proc and of some groups' folders."""
    everything = {
        "proc/self": {"mountinfo": mounts, "cgroup": groups},
        "proc": {"meminfo": "MemTotal:  1000 kB\nMemAvailable:  800 kB\nHugePages_Total:  0"},
        **{f"sys/fs/cgroup/{folder}": texts for folder, texts in files.items()},
    }
    for folder, texts in everything.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (root / folder / name).write_text(f"{text}\n")
    return root


def test_version_2_counts_pages_of_files_as_free(tmp_path: Path) -> None:
    root = system(tmp_path, V2.format(inside="/"), "0::/job", {"job": MEMORY_V2})
    assert list(cgroups.memory_limits(root)) == [("memory.max", 250 * MB, 150 * MB)]


def test_version_1_counts_them_with_those_of_groups_inside(tmp_path: Path) -> None:
    groups = "9:name=systemd:/\n4:memory:/job\n0::/"
    root = system(tmp_path, V1.format(inside="/"), groups, {"memory/job": MEMORY_V1})
    assert list(cgroups.memory_limits(root)) == [("memory.limit_in_bytes", 250 * MB, 150 * MB)]


def test_groups_around_this_one_limit_it_too_and_the_softer_limit_as_well(tmp_path: Path) -> None:
    inner = {**MEMORY_V2, "memory.max": "max", "memory.high": 240 * MB}
    root = system(tmp_path, V2.format(inside="/"), "0::/a/b", {"a/b": inner, "a": MEMORY_V2})
    names = [(limit.name, limit.limit) for limit in cgroups.memory_limits(root)]
    assert names == [("memory.high", 240 * MB), ("memory.max", 250 * MB)]


@pytest.mark.parametrize(
    ("inside", "group"), [("/", "/"), ("/docker/abc", "/docker/abc"), ("/", "/../../other")]
)
def test_a_container_that_sees_its_group_as_the_root_is_limited(
    tmp_path: Path, inside: str, group: str
) -> None:
    root = system(tmp_path, V2.format(inside=inside), f"0::{group}", {"": MEMORY_V2})
    assert [limit.limit for limit in cgroups.memory_limits(root)] == [250 * MB]


@pytest.mark.parametrize(
    ("mounts", "folder", "files"),
    [
        (V2, "job", {"memory.max": "max", "memory.current": 5, "cpu.max": "max 100000"}),
        (V1, "memory/job", {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": 5}),
        (V1, "cpu/job", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}),
        (V2, "job", {"memory.max": "garbage", "memory.current": 5, "cpu.max": "1 2 3"}),
    ],
)
def test_groups_without_a_limit_limit_nothing(
    tmp_path: Path, mounts: str, folder: str, files: Mapping[str, object]
) -> None:
    groups = "0::/job" if mounts == V2 else "4:memory:/job\n1:cpu,cpuacct:/job"
    root = system(tmp_path, mounts.format(inside="/"), groups, {folder: files})
    assert list(cgroups.memory_limits(root)) == []
    assert cgroups.processors(root) is None


def test_a_system_without_groups_is_asked_nothing(tmp_path: Path) -> None:
    assert list(cgroups.memory_limits(tmp_path)) == []
    assert cgroups.processors(tmp_path) is None
    assert machine.free_memory(root=tmp_path) > 0


@pytest.mark.parametrize(("quota", "usable"), [(50_000, 1), (100_000, 1), (150_000, 2)])
def test_a_quota_of_processor_time_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: int, usable: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "v2").mkdir()
    files = {"job": {"cpu.max": f"{quota} 100000"}}
    assert machine.cores(system(tmp_path / "v2", V2.format(inside="/"), "0::/job", files)) == usable
    files = {"cpu/job": {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": 100_000}}
    root = system(tmp_path, V1.format(inside="/"), "1:cpu,cpuacct:/job", files)
    assert machine.cores(root) == usable
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3}, raising=False)
    assert machine.cores(root) == 1


def test_what_is_free_is_the_least_of_all_and_shared_by_ranks_unless_it_is_each_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = system(tmp_path, V2.format(inside="/"), "0::/job", {"job": MEMORY_V2})
    assert machine.free_memory(root=root) == 800 * 1024
    assert machine.free_memory(4, root) == 200 * 1024
    status = "VmSize:  100 kB\nVmData:  50 kB"
    (root / "proc/self/status").write_text(status)
    limits = {resource.RLIMIT_AS: 350 * 1024, resource.RLIMIT_DATA: 150 * 1024}
    monkeypatch.setattr("resource.getrlimit", lambda what: (limits[what], limits[what]))
    assert machine.free_memory(2, root) == 100 * 1024
    assert machine.tightest_limit(root).name == "ulimit -d"
    limits[resource.RLIMIT_DATA] = resource.RLIM_INFINITY
    assert machine.free_memory(2, root) == 250 * 1024


def test_this_machine_says_what_is_free() -> None:
    limits = list(machine.memory_limits())
    assert limits[0].name == "memory of this machine"
    assert 0 < limits[0].free <= limits[0].limit
    assert 0 < machine.free_memory() < limits[0].limit
    assert machine.free_memory(1000) < machine.free_memory()
    assert machine.cores() >= 1
