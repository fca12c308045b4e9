"""The model of the recipe, and its schedules."""

from __future__ import annotations

import math

import pytest

from lfm2kit.checkpoint.config import model_spec, parse_config
from lfm2kit.errors import Lfm2kitError
from training.recipe import CONFIG, Recipe


def test_the_model_takes_less_than_10_MB_in_bf16_and_has_widths_for_blocks_of_32() -> None:  # noqa: N802
    shapes = model_spec(parse_config(CONFIG), tied=True).parameters()
    assert 2 * sum(map(math.prod, shapes.values())) < 9.9e6
    widths = {
        size
        for name, shape in shapes.items()
        if len(shape) == 2
        for size in (shape[-1:] if name.endswith("gate.weight") else shape)
    }
    assert all(width % 32 == 0 for width in widths)


def test_rates_rise_then_fall_to_zero() -> None:
    recipe = Recipe(tokens=100 * 64, sequences=4, length=16, warmup=0.1)
    rates = [recipe.rate_at(step) for step in range(recipe.steps + 1)]
    assert recipe.steps == 100
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == 0.0


def test_the_routers_biases_stay_at_the_end() -> None:
    recipe = Recipe(tokens=100 * 64, sequences=4, length=16, frozen_bias=0.05)
    rates = [recipe.bias_rate_at(step) for step in range(recipe.steps)]
    assert rates[95:] == [0.0] * 5
    assert all(rate > 0 for rate in rates[:95])
    assert max(rates) == recipe.bias_rate


def test_there_is_always_a_step() -> None:
    assert Recipe(tokens=1).steps == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"sequences": 0}, {"length": 0}, {"dropout": 1.0}, {"adam_rate": math.nan},
        {"muon_rate": math.inf}, {"weight_decay": -1.0}, {"warmup": 1.5}, {"frozen_bias": math.nan},
        {"seed": 2**63},
    ],
)  # fmt: skip
def test_values_with_which_nothing_can_be_trained_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Lfm2kitError, match="give"):
        Recipe(**bad)  # type: ignore[arg-type]
