"""`lfm2kit plan` counts the arrays that a forward really copies."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2kit.backend import Batch
from lfm2kit.building.copies import copies_of
from lfm2kit.rewrites.experts_split import experts_split
from lfm2kit.rewrites.parted_experts import Places
from lfm2kit.rewrites.trim import TRIM
from tests.core.small import build, small_spec
from tests.core.test_model import (
    SEQUENCES,
    AroundBackend,
    DeviceBackend,
    Elsewhere,
)

PLANS = {
    "reference": 0,
    "device": 6,  # the batch's arrays and the logits
    "reference,moe=device": 2 * (3 + 4),  # of each router and its experts
    "device,choice=reference": 6 + 2 * 3,
    "device,router=reference": 6 + 2 * 3,
    "device,1=reference": None,
    "reference,attn=device,embed=device,head=device,rows=device": None,
    "reference,norm=device": None,
    "reference,0.norm=device": None,
    "device,2-3.experts=other": None,
    "device,1.norm=other,0.conv=other": None,
    "around": None,
    "reference,2=device,0.norm=other": None,
}
REWRITES = {
    "trimmed": TRIM,
    "split": experts_split({2: Places((0, 3), (4,)), 3: Places((1,), (2, 0))}),
}


def copied(plan: str, *rewrites: Any, **changes: Any) -> tuple[int, int]:
    """Return how many copies are counted in a plan, and how many a forward makes."""
    others: dict[str, Any] = {
        "device": DeviceBackend(),
        "other": DeviceBackend(),
        "around": AroundBackend(),
    }
    others["other"].there = Elsewhere("elsewhere too")
    model = build(small_spec(**changes), plan, others, rewrites=rewrites)
    memories = [backend.there for backend in others.values()]
    before = sum(memory.crossings for memory in memories)
    model.logits(Batch.of_sequences(SEQUENCES))
    made = sum(memory.crossings for memory in memories) - before
    return copies_of(model.placed).total, made


@pytest.mark.parametrize("plan", PLANS)
def test_the_copies_of_a_plan_are_those_that_a_forward_makes(plan: str) -> None:
    counted, made = copied(plan)
    assert counted == made
    assert PLANS[plan] in (None, made)


@pytest.mark.parametrize("name", REWRITES)
@pytest.mark.parametrize("plan", ["device", "device,experts=reference", "reference,moe=device"])
def test_the_copies_of_a_rewritten_model_are_counted(plan: str, name: str) -> None:
    if (name, plan) == ("split", "reference,moe=device"):
        plan = "reference,moe=device,host_experts=other,streamed_experts=device"
    counted, made = copied(plan, REWRITES[name])
    assert counted == made


def test_operators_of_trimmed_layers_have_batches_of_their_own() -> None:
    types = ["full_attention", "conv", "conv", "conv"]
    counted, made = copied("device,3.conv=other,2.conv=reference", TRIM, layer_types=types)
    assert counted == made
    assert counted > copied("device,3.conv=other,2.conv=reference", layer_types=types)[0]
