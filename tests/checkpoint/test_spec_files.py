"""A model described by a TOML file of specs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.building.loading import find_model, load_model
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.convert import config_fields, write_checkpoint
from lfm2kit.checkpoint.spec_files import read_spec, spec_text
from lfm2kit.checkpoint.synth import random_source
from lfm2kit.errors import Lfm2kitError
from tests.checkpoint.typed import Cli
from tests.core.small import config, small_spec

ORACLE = Path(__file__).parents[1] / "oracle"

SMALL = """
vocab_size = 50
hidden_size = 24
eps = 1e-5
norm_eps = 1e-5
rope_theta = 5000
kernel_size = 3

[[layers]]
operator = { type = "ShortConv" }
feed_forward = { type = "MLP", intermediate_size = 40 }

[[layers]]
operator = { type = "Attention", num_attention_heads = 4, num_key_value_heads = 2, head_dim = 6 }
feed_forward = { type = "MLP", intermediate_size = 40 }

[[layers]]
operator = { type = "ShortConv" }
[layers.feed_forward]
type = "SparseMoe"
num_experts = 5
num_experts_per_tok = 3
use_expert_bias = true
norm_topk_prob = true
routed_scaling_factor = 1.5
intermediate_size = 12

[[layers]]
operator = { type = "Attention", num_attention_heads = 4, num_key_value_heads = 2, head_dim = 6 }
[layers.feed_forward]
type = "SparseMoe"
num_experts = 5
num_experts_per_tok = 3
use_expert_bias = true
norm_topk_prob = true
routed_scaling_factor = 1.5
intermediate_size = 12
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model.toml"
    path.write_text(text)
    return path


def test_it_says_the_same_as_a_config(tmp_path: Path) -> None:
    assert read_spec(written(tmp_path, SMALL)) == small_spec()


def test_repeat_makes_equal_layers(tmp_path: Path) -> None:
    head, layer = SMALL.split("[[layers]]")[:2]
    spec = read_spec(written(tmp_path, f"{head}[[layers]]\nrepeat = 7\n{layer}"))
    assert len(spec.layers) == 7
    assert len(set(spec.layers)) == 1


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('type = "ShortConv"', 'type = "Mamba"', "Mamba"),
        ('{ type = "ShortConv" }', "3", "operator"),
        ("intermediate_size = 40", "intermediate_size = -1", "intermediate_size"),
        ("intermediate_size = 40", "width = 40", "width"),
        ("vocab_size = 50", "", "vocab_size"),
        ("eps = 1e-5", 'eps = "small"', "eps"),
        ("use_expert_bias = true", "use_expert_bias = 1", "use_expert_bias"),
        ("kernel_size = 3", "kernel_size = 0", "kernel_size"),
        ("[[layers]]", "[[layer]]", "layers"),
        ("num_key_value_heads = 2", "num_key_value_heads = 3", "num_key_value_heads"),
        ("num_experts_per_tok = 3", "num_experts_per_tok = 6", "num_experts_per_tok"),
        ("[[layers]]", "[[layers]", "TOML"),
        (
            "vocab_size = 50",
            'vocab_size = 50\ntie_word_embeddings = "false"',
            "tie_word_embeddings",
        ),
        (
            "vocab_size = 50",
            "vocab_size = 50\nmax_position_embeddings = 0",
            "max_position_embeddings",
        ),
        ("vocab_size = 50", "vocab_size = 50\nvocab_sise = 50", "Did you mean 'vocab_size'"),
        ("vocab_size = 50", "vocab_size = 50\n[rope]\nx = 1", "no key 'rope'"),
        ("vocab_size = 50", "vocab_size = 50\nvocab_size = 51", "TOML"),
        ('type = "ShortConv"', 'type = "ShortConv", hidden_size = 48', "hidden_size"),
        ("[[layers]]", "[[layers]]\nrepeat = true", "repeat"),
        ("[[layers]]", "[[layers]]\nrepeat = 1025", "repeat"),
        ("[[layers]]", "[[layers]]\nrepeat = 1000", "more than 1024 layers"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, old: str, new: str, named: str) -> None:
    with pytest.raises(Lfm2kitError, match=named) as caught:
        read_spec(written(tmp_path, SMALL.replace(old, new)))
    assert "\n" not in str(caught.value)
    assert "model.toml" in str(caught.value)


# ---- from specs to a file ----

MODELS = [*sorted(path for path in ORACLE.iterdir() if path.is_dir()), find_model("tiny")]


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_a_model_comes_back_from_its_file(model: Path, tmp_path: Path) -> None:
    spec = open_checkpoint(model).spec
    assert read_spec(written(tmp_path, spec_text(spec))) == spec


@pytest.mark.parametrize("changes", [{"conv_bias": True}, {"norm_eps": 1e-6}, {"rope_theta": 5e6}])
def test_every_setting_comes_back(changes: dict[str, Any], tmp_path: Path) -> None:
    spec = small_spec(**changes)
    assert read_spec(written(tmp_path, spec_text(spec))) == spec
    untied = replace(spec, tie_word_embeddings=False)
    assert read_spec(written(tmp_path, spec_text(untied))) == untied


def test_equal_neighbours_are_one_table() -> None:
    layer = small_spec().layers[0]
    text = spec_text(replace(small_spec(), layers=(layer, layer, *small_spec().layers[1:], layer)))
    assert text.count("[[layers]]") == 5
    assert text.count("repeat = 2") == 1


def test_a_model_that_no_file_can_describe_is_refused() -> None:
    spec = small_spec()
    odd = replace(spec, embedding_norm=replace(spec.embedding_norm, eps=1e-3))
    with pytest.raises(Lfm2kitError, match="cannot describe this model"):
        spec_text(odd)


# ---- a file as a model ----


def beside(model: Path, folder: Path) -> Path:
    """Return the file of specs of an oracle's model, beside its weights but no config.json."""
    for path in model.glob("model*.safetensors*"):
        (folder / path.name).symlink_to(path)
    (folder / "mine.toml").write_text(spec_text(open_checkpoint(model).spec))
    return folder / "mine.toml"


@pytest.mark.parametrize("case", ["router_bias_and_normalisation", "sequences_of_many_lengths"])
def test_a_file_runs_with_the_weights_beside_it(case: str, tmp_path: Path) -> None:
    expected = np.load(ORACLE / case / "expected.npz")
    batch = Batch.of_sequences([expected["ids_0"]])
    logits = load_model(beside(ORACLE / case, tmp_path), "reference").logits(batch)
    np.testing.assert_allclose(logits[0], expected["logits_0"][-1], rtol=0, atol=2e-5)


def test_weights_of_another_model_beside_it_are_refused(tmp_path: Path) -> None:
    path = beside(ORACLE / "router_bias_and_normalisation", tmp_path)
    path.write_text(spec_text(small_spec()))
    with pytest.raises(Lfm2kitError, match=r"mine\.toml: (there is no tensor|tensor)") as raised:
        open_checkpoint(path)
    advice = "for random weights, move mine.toml into another folder"
    assert str(raised.value).endswith(f"those of {tmp_path / 'model.safetensors'}: {advice}")


def random_logits(path: Path, **options: Any) -> Any:
    batch = Batch.of_sequences([[1, 2, 3], [4, 5]])
    with pytest.warns(UserWarning, match="there are no weights beside it, so they are random"):
        return load_model(path, "reference", **options).logits(batch)


def test_without_weights_they_are_random_by_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path, spec_text(small_spec()))
    logits = random_logits(path)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    assert np.array_equal(random_logits(path, seed=0), logits)
    assert not np.array_equal(random_logits(path, seed=1), logits)


def test_random_weights_are_those_that_a_conversion_would_write(tmp_path: Path) -> None:
    write_checkpoint(random_source(config_fields(config()), seed=3), tmp_path / "model")
    whole = load_model(tmp_path / "model", "reference")
    batch = Batch.of_sequences([[1, 2, 3], [4, 5]])
    path = written(tmp_path, spec_text(small_spec()))
    assert np.array_equal(random_logits(path, seed=3), whole.logits(batch))


def test_a_model_of_any_size_is_planned_without_its_weights(cli: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, cli("specs", "lfm2-8b-a1b").out)
    done = cli("plan", "-m", path, "-b", "reference", "--json", "-")
    fields = json.loads(done.out)
    assert fields["totals"]["host"]["weight_bytes"] > 33e9
    assert "so they are random" in fields["notes"][0]


def test_a_run_says_which_weights_it_took(cli: Cli, tmp_path: Path) -> None:
    run = ("run", "-b", "reference", "--random-inputs", 3, "-n", 1, "--seed", 5, "--json", "-")
    alone = cli(*run, "-m", written(tmp_path, spec_text(small_spec())))
    assert json.loads(alone.out)["weights"] == "random, seed 5"
    assert "Weights: random, seed 5" in alone.err
    assert alone.err.count("seed") == 1
    (tmp_path / "folder").mkdir()
    path = beside(ORACLE / "router_bias_and_normalisation", tmp_path / "folder")
    assert json.loads(cli(*run, "-m", path).out)["weights"] == "model.safetensors"


def test_specs_of_a_config_alone_are_its_models(cli: Cli) -> None:
    tiny = find_model("tiny")
    assert cli("specs", tiny / "config.json").out == cli("specs", "tiny").out
    assert cli("specs", "wide-6").out.startswith("tie_word_embeddings = true\nvocab_size = 65536")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--random-inputs", 2, "--json", "m.toml", "-m", "m.toml"), "one of the model's"),
        (("convert", "m.toml", "new"), "no config.json to convert"),
        (("specs", "missing"), "no model 'missing'"),
        (("plan", "-m", "pyproject.toml"), "no key 'build-system'"),
    ],
)
def test_what_a_file_of_specs_cannot_be_is_one_line(
    words: tuple[Any, ...], says: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.toml").write_text(spec_text(small_spec()))
    (tmp_path / "pyproject.toml").write_text("[build-system]\nrequires = []\n")
    cli(*words).assert_fails(says)
    assert (tmp_path / "m.toml").read_text() == spec_text(small_spec())
