"""Which GPU a rank works on, and that two ranks never share one, on machines that are made up."""

from __future__ import annotations

import ctypes
from typing import Any
from uuid import UUID

import pytest
from lfm2kit_cuda import choosing

from lfm2kit.backend import Context
from lfm2kit.errors import Lfm2kitError
from lfm2kit.ranks.agreement import Fact, Refusal, compared

Machine = list[list[str]]  # for each rank, the GPUs that it sees, in its order


def verdict(machine: Machine) -> Refusal | None:
    """Return what ranks that see these GPUs are told."""
    reports = []
    for rank, visible in enumerate(machine):
        context = Context(local_ranks=len(machine), local_rank=rank)
        device = choosing.device_for(context, len(visible), current=0)
        name = f"memory lfm2kit_cuda:{device}"
        reports.append({name: Fact(f"the GPU {visible[device]}", is_own=True)})
    return compared(reports)


@pytest.mark.parametrize(
    "machine",
    [
        [["a", "b", "c", "d"]] * 4,  # all see all
        [["a", "b", "c", "d"]] * 2,
        [["a"], ["b"], ["c"], ["d"]],  # srun --gpus-per-task=1
        [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]],  # srun --gpus-per-task=2
        [["a"], ["a", "b"]],
    ],
)
def test_ranks_with_enough_gpus_have_one_each(machine: Machine) -> None:
    assert verdict(machine) is None


@pytest.mark.parametrize(
    ("machine", "ranks"),
    [
        ([["a"]] * 4, "ranks 0-3 would share the GPU a"),
        ([["a", "b"]] * 4, "ranks 0, 2 would share the GPU a; ranks 1, 3 would share the GPU b"),
        ([["a", "b"], ["b", "a"]], "ranks 0, 1 would share the GPU a"),
        ([["a"], ["b"], ["a"]], "ranks 0, 2 would share the GPU a"),
    ],
)
def test_ranks_that_would_share_a_gpu_are_refused(machine: Machine, ranks: str) -> None:
    refusal = verdict(machine)
    assert refusal is not None
    assert refusal.sentence.startswith(f"{ranks}; give each rank one of its own")


@pytest.mark.parametrize("current", [0, 3])
def test_a_process_that_is_alone_works_on_the_current_device(current: int) -> None:
    assert choosing.device_for(Context(), 4, current) == current


class Driver:
    """A libcuda.so.1 with one device, 2."""

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, handle: Any, device: int) -> int:  # noqa: N802
        handle._obj.value = 20
        return 0 if device == 2 else 101

    def cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:  # noqa: N802
        assert handle.value == 20
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, handle: Any) -> int:  # noqa: N802
        uuid.raw = UUID(int=7).bytes
        return 0


def test_a_gpu_is_told_apart_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert choosing.identity(2) == "NVIDIA H200 with UUID 00000000-0000-0000-0000-000000000007"
    with pytest.raises(Lfm2kitError, match=r"does not describe device 0 \(error 101\)"):
        choosing.identity(0)
