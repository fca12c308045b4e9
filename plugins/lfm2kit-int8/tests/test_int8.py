"""A model rounded to int8 is read, and gives the values that its scales say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lfm2kit_int8.__main__ import main, quantise
from lfm2kit_int8.formats import I8, rounded
from lfm2kit_int8.reader import CONFIG, WEIGHTS, open_folder, recognises

import lfm2kit.testing
from lfm2kit.backend import Batch
from lfm2kit.building.loading import find_model, load_model

TINY = find_model("tiny")


@lfm2kit.testing.parametrize_backend_checks("int8", precision="q8")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_experts_of_int8_beside_other_blocks_say_nearly_the_same() -> None:
    batch = Batch.of_sequences([[1, 2, 3], [4, 5, 6, 7]])
    plans = ("reference,experts=int8:q8", "reference")
    got, want = (load_model(TINY, plan).logits(batch).copy() for plan in plans)
    assert 0.95 < np.corrcoef(got.ravel(), want.ravel())[0, 1] < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    new = tmp_path_factory.mktemp("int8") / "model"
    quantise(TINY, new)
    return new


def test_matrices_lose_half_a_step_of_their_scale_at_most() -> None:
    values = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    values[3] = 0
    data, scales = rounded(values)
    assert data.dtype == np.int8
    assert data.shape == (5, 40)
    assert scales.dtype == np.float32
    error = np.abs(data * scales[:, None] - values)
    assert np.all(error <= 0.501 * scales[:, None])


def test_only_folders_of_this_method_are_recognised(folder: Path, tmp_path: Path) -> None:
    assert recognises(folder)
    assert not recognises(TINY)
    assert not recognises(folder / WEIGHTS)
    assert not recognises(tmp_path)


def test_what_is_opened_is_what_was_written(folder: Path) -> None:
    weights, original = open_folder(folder).weights, lfm2kit_weights()
    assert weights.keys() == original.keys()
    for name, tensor in weights.items():
        values = original[name]
        if tensor.format.name == "I8":
            data, scales = rounded(values)
            values = data * scales[:, None]
        np.testing.assert_array_equal(tensor.float32(), values, name)
    assert weights["layers.3.feed_forward.gate.weight"].format.name == "BF16"


def lfm2kit_weights() -> dict[str, np.ndarray]:
    from lfm2kit.checkpoint import open_checkpoint

    return {name: tensor.float32() for name, tensor in open_checkpoint(TINY).weights.items()}


def test_the_model_runs_and_says_nearly_the_same(folder: Path) -> None:
    batch = Batch.of_sequences([[1, 2, 3], [4, 5, 6, 7]])
    got, want = (load_model(path, "reference").logits(batch).copy() for path in (folder, TINY))
    assert 0.95 < np.corrcoef(got.ravel(), want.ravel())[0, 1] < 1


@pytest.mark.parametrize(
    ("model", "new", "what"),
    [
        ("nowhere", "new", "nowhere has no config.json"),
        ("tiny", ".", "is there, or cannot be made; name a new folder"),
        ("tiny", "no/folder", "is there, or cannot be made; name a new folder"),
        ("broken", "new", "config.json"),
    ],
)
def test_what_cannot_be_rounded_is_named_in_one_line_and_nothing_is_written(
    model: str,
    new: str,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / CONFIG).write_text("{")
    source = TINY if model == "tiny" else tmp_path / model
    monkeypatch.setattr("sys.argv", ["lfm2kit_int8", str(source), str(tmp_path / new)])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert what in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_tokenizer_goes_along(folder: Path) -> None:
    assert (folder / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert not folder.with_name("model.partial").exists()


def test_a_matrix_without_its_scales_is_named(folder: Path, tmp_path: Path) -> None:
    from lfm2kit.checkpoint import read_safetensors, write_safetensors

    stored = read_safetensors(folder / WEIGHTS, {"I8": I8})
    del stored["embed_tokens.weight_scale"]
    entries = [(name, tensor.format, tensor.shape) for name, tensor in stored.items()]
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    with open(tmp_path / WEIGHTS, "wb") as file:
        write_safetensors(file, entries, lambda name: [stored[name].data])
    with pytest.raises(lfm2kit.Lfm2kitError, match=r"there is no 'embed_tokens\.weight_scale'"):
        open_folder(tmp_path)
