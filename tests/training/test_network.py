"""The network and what trains it, where torch is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch

from lfm2kit import Batch, load_model
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.config import parse_config
from lfm2kit.formats import BF16, F32
from training.checkpoints import arrays_of, read_network, write_network
from training.network import Network
from training.optimisers import balance, optimisers, orthogonal
from training.recipe import CONFIG, Recipe

SMALL = CONFIG | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_experts": 5}
IDS = [1, 5, 9, 33, 2, 63, 0, 7, 7, 12]


def network() -> Network:
    """Return a small network with random weights and biases."""
    torch.manual_seed(0)
    made = Network(parse_config(SMALL))
    for router in made.routers().values():
        torch.nn.init.normal_(router.expert_bias, std=0.1)
    return made.eval()


def test_an_exported_network_has_the_references_logits(tmp_path: Path) -> None:
    made = network()
    write_network(made, SMALL, tmp_path / "model", None, F32)
    with torch.no_grad():
        logits = made(torch.tensor([IDS]))[0, -1].numpy()
    expected = load_model(tmp_path / "model", "reference").logits(Batch.of_sequences([IDS]))[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_network_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    made = network()
    write_network(made, SMALL, tmp_path / "model", None, F32)
    back = arrays_of(read_network(tmp_path / "model"))
    for name, values in arrays_of(made).items():
        np.testing.assert_array_equal(back[name], values, err_msg=name)


def test_biases_stay_float32_in_a_bf16_checkpoint(tmp_path: Path) -> None:
    made = network()
    write_network(made, SMALL, tmp_path / "model", None, BF16)
    stored = open_checkpoint(tmp_path / "model").weights
    for name, values in arrays_of(made).items():
        is_bias = name.endswith("expert_bias")
        assert stored[name].format == (F32 if is_bias else BF16)
        if is_bias:
            np.testing.assert_array_equal(stored[name].float32(), values)


def test_every_parameter_is_trained_by_one_optimiser() -> None:
    made = network()
    each = [p for o in optimisers(made, Recipe()) for g in o.param_groups for p in g["params"]]
    assert len(each) == len({id(p) for p in each}) == len(list(made.parameters()))


def test_biases_move_towards_an_equal_load_and_counting_begins_anew() -> None:
    made = network()
    made(torch.tensor([IDS]))
    for router in made.routers().values():
        load, before = router.load.clone(), router.expert_bias.clone()
        assert load.sum() == len(IDS) * 4
        balance([router], 0.01)
        moved = router.expert_bias - before
        np.testing.assert_allclose(moved, 0.01 * torch.sign(load.mean() - load), atol=1e-7)
        assert router.load.sum() == 0


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 16, 24)])
def test_muons_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert 0.6 < values.min() < values.max() < 1.3
