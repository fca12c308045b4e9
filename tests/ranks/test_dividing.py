"""What `--parallel auto` takes: ranks that share experts, or ranks that each hold all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lfm2kit.building.dividing import FEW_ROWS, rows_of_an_expert
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.memory import HostMemory
from lfm2kit.ranks.joining import fitting_alike
from lfm2kit.ranks.shares import shares
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import World
from tests.random_model import RANDOM

TOGETHER, ALONE = ((0, 1),), ((0,), (1,))
FEW = FEW_ROWS * 16 // 4  # tokens of a rank, each of which chooses 4 of 16 experts
MANY = FEW + 1


class DeviceMemory(HostMemory):
    name = "device:0"


@pytest.fixture
def on_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceBackend, "memory", lambda self, spec: DeviceMemory())


def groups_of(tokens: int | None, nodes: tuple[int, ...] = (0, 0), **asked: Any) -> Any:
    options = Options(backend="reference", **asked)
    return set_up(RANDOM, options, world=World.of(0, nodes), tokens=tokens).grouping.groups


def test_rows_of_an_expert_are_those_of_tokens_that_choose_evenly() -> None:
    assert rows_of_an_expert(RANDOM.spec, FEW) == FEW_ROWS


@pytest.mark.usefixtures("on_devices")
def test_devices_share_experts_that_have_few_rows() -> None:
    assert groups_of(FEW) == TOGETHER
    assert groups_of(MANY) == ALONE
    assert groups_of(None) == TOGETHER


@pytest.mark.usefixtures("on_devices")
def test_it_is_a_ranks_own_rows_that_count_however_many_ranks_there_are() -> None:
    assert groups_of(FEW, nodes=(0, 0, 0, 0)) == ((0, 1, 2, 3),)
    assert groups_of(MANY, nodes=(0, 0, 0, 0)) == ((0,), (1,), (2,), (3,))
    assert groups_of(FEW, nodes=(0, 0, 1, 1)) == ((0, 1), (2, 3))
    assert groups_of(MANY, nodes=(0, 0, 1, 1)) == ((0,), (1,), (2,), (3,))


def test_ranks_in_one_memory_share_experts() -> None:
    assert groups_of(100 * MANY) == TOGETHER


@pytest.mark.usefixtures("on_devices")
@pytest.mark.parametrize("asked", [{"parallel": "ep"}, {"ep_size": 2}, {"overlap": "on"}], ids=str)
def test_ranks_that_are_asked_to_share_do(asked: dict[str, Any]) -> None:
    assert groups_of(100 * MANY, **asked) == TOGETHER


@pytest.mark.usefixtures("on_devices")
def test_a_plan_for_all_ranks_divides_experts_as_a_job_does() -> None:
    options = Options(backend="reference")
    for tokens, groups in ((FEW, TOGETHER), (MANY, ALONE)):
        assert shares(RANDOM, options, [0, 0], tokens)[0].grouping.groups == groups


@pytest.mark.usefixtures("on_devices")
def test_all_ranks_share_experts_if_one_has_no_room_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rank(transport: ThreadTransport) -> Any:
        options = Options(backend="reference")
        setup = set_up(RANDOM, options, transport=transport, tokens=MANY)
        if transport.world.rank == 1:  # as if its share had not fitted alone
            setup = replace(setup.again(grouping=setup.choices[1]), choices=setup.choices)
        return fitting_alike(transport, setup).grouping.groups

    assert run_ranks(2, rank) == [TOGETHER, TOGETHER]
