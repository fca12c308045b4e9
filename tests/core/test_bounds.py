"""One bound for each size, whichever file or option says it, and refused before memory is taken."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from lfm2kit import bounds
from lfm2kit.checkpoint.config import read_config
from lfm2kit.checkpoint.spec_files import read_spec
from lfm2kit.errors import Lfm2kitError
from tests.checkpoint.test_spec_files import SMALL
from tests.core.small import FIELDS

# The names that a config.json and a model.toml give one size.
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "conv_L_cache": "kernel_size",
    "norm_eps": "eps",
    "rope_theta": "rope_theta",
    "routed_scaling_factor": "routed_scaling_factor",
}


def config_of(folder: Path, key: str, value: object) -> str:
    """Return what refuses a config.json in which `key` is `value`."""
    (folder / "config.json").write_text(json.dumps({**FIELDS, key: value}))
    with pytest.raises(Lfm2kitError) as caught:
        read_config(folder / "config.json")
    return str(caught.value)


def toml_of(folder: Path, key: str, value: object) -> str:
    """Return the same for a model.toml."""
    text = re.sub(rf"\b{key} = [^\s,]+", f"{key} = {value}", SMALL)
    (folder / "model.toml").write_text(text)
    with pytest.raises(Lfm2kitError) as caught:
        read_spec(folder / "model.toml")
    return str(caught.value)


@pytest.mark.parametrize("key", [key for key in NAMES if key in bounds.LARGEST])
@pytest.mark.parametrize("beyond", [1, 2**40])
def test_a_whole_number_beyond_its_bound_is_named(tmp_path: Path, key: str, beyond: int) -> None:
    value = bounds.LARGEST[key] + beyond
    assert f"{key} is {value}" in config_of(tmp_path, key, value)
    assert f"{NAMES[key]} is {value}" in toml_of(tmp_path, NAMES[key], value)


@pytest.mark.parametrize("key", [key for key in NAMES if key in bounds.REAL])
@pytest.mark.parametrize("value", [0, -1.0, 5e-324, 1e300])
def test_an_absurd_real_number_is_named(tmp_path: Path, key: str, value: float) -> None:
    assert f"{key} is {value}" in config_of(tmp_path, key, value)
    assert f"{NAMES[key]} is {value}" in toml_of(tmp_path, NAMES[key], value)


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_what_is_no_number_is_refused_in_toml_too(tmp_path: Path, value: str) -> None:
    assert f"eps is {value}" in toml_of(tmp_path, "eps", value)


def test_many_layers_of_many_experts_are_counted_and_not_made(tmp_path: Path) -> None:
    """A file of 600 bytes must not take gigabytes of names."""
    head, *layers = SMALL.split("[[layers]]")
    layer = layers[-1].replace("num_experts = 5", "num_experts = 1024")
    path = tmp_path / "model.toml"
    path.write_text(f"{head}[[layers]]\nrepeat = 1024\n{layer}")
    tracemalloc.start()
    with pytest.raises(Lfm2kitError, match="tensors"):
        read_spec(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    kinds = {"layer_types": ["conv"] * 1024, "num_hidden_layers": 1024, "num_experts": 1024}
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, **kinds}))
    with pytest.raises(Lfm2kitError, match="tensors"):
        read_config(tmp_path / "config.json")
