"""The model card says what the record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.building.loading import find_model
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring import samples
from training import card
from training.choose import note_candidates
from training.commands import ended
from training.recipe import CONFIG

RECORD: dict[str, Any] = {
    "data": {"novels": [5049892, 1585418], "held_out_novels": [159075, 49944]},
    "parameters": 4934112,
    "bits_per_byte": {"all": 1.31, "held_out_speeches": 1.21, "held_out_novels": 1.47},
    "experts": [{"layer": 2, "shares": [0.25] * 4, "top_over_mean": 1.37, "bias_std": 0.12}],
    "samples": ["It is a truth {that}\n\nthe captain"],
    "command": "python -m training.train --tokens 41e6",
    "seed": 7,
    "hardware": "a GPU, torch 2",
    "seconds": 90,
    "tokens": 41000000,
    "curve": [[1000000, 4.0, 1.9], [41000000, 3.0, 1.3111]],
}
INPUTS = {
    "count": 128,
    "length": 16,
    "candidates": 144,
    "gap_rule": 1e-4,
    "least_gap": 1.1e-4,
    "least_margin": 6e-3,
    "transformers": "5.17.0",
}


def test_the_card_says_what_was_measured() -> None:
    text = card.render(RECORD)
    for said in (
        "**1.310 bits per byte**",
        "1.470 for novels, 1.210 for speeches",
        "4.93 M parameters",
        "    python -m training.train --tokens 41e6",
        "a GPU, torch 2; 1.5 minutes; 41.0 M tokens; seed 7",
        "| novels | 5,049,892 | 1,585,418 |",
        "| 41.00 | 3.000 | 1.311 |",
        "| 2 | 1.37 | 0.12 |",
        "> It is a truth {that} the captain",
        "CC0 1.0",
    ):
        assert said in text


def test_inputs_are_added_later(tmp_path: Path) -> None:
    card.write(tmp_path, RECORD)
    assert "There are none yet" in (tmp_path / "README.md").read_text()
    card.add(tmp_path, inputs=INPUTS)
    text = (tmp_path / "README.md").read_text()
    assert "128 beginnings of held-out paragraphs, 16 tokens each, of 144" in text
    assert "closer than 1.1e-04" in text
    assert "transformers 5.17.0 in float64" in text
    assert json.loads((tmp_path / "training.json").read_text()) == RECORD | {"inputs": INPUTS}


def trained(folder: Path, rate: str, bits: float) -> Path:
    folder.mkdir()
    command = f"python -m training.train --data d --out o --device cuda --tokens 41000000{rate}"
    card.write(folder, RECORD | {"command": command, "bits_per_byte": bits_of(bits)})
    return folder


def bits_of(all_: float) -> dict[str, float]:
    return {"all": all_, "held_out_speeches": all_, "held_out_novels": all_}


def test_the_best_of_several_trainings_says_so_whatever_is_added_later(tmp_path: Path) -> None:
    best, worse = trained(tmp_path / "a", " --dropout 0.1", 1.2), trained(tmp_path / "b", "", 1.3)
    bad = trained(tmp_path / "c", " --seed 2", 1.4)
    assert "the best of" not in (best / "README.md").read_text()
    note_candidates(best, [bad, worse])
    card.add(best, inputs=INPUTS)
    text = (best / "README.md").read_text()
    assert "the best of 3 trainings" in text
    assert "slightly too good" in text
    rows = [line for line in text.splitlines() if line.startswith("| `--tokens")]
    assert rows == [
        "| `--tokens 41000000 --dropout 0.1` | 1.2000 |",
        "| `--tokens 41000000` | 1.3000 |",
        "| `--tokens 41000000 --seed 2` | 1.4000 |",
    ]


def test_only_the_best_is_called_so(tmp_path: Path) -> None:
    one, better = trained(tmp_path / "one", "", 1.3), trained(tmp_path / "better", "", 1.2)
    before = (one / "README.md").read_bytes()
    with pytest.raises(Lfm2kitError, match=r"better is better than .*one; name the best"):
        note_candidates(one, [better])
    assert (one / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not readable JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "not the record of a training (KeyError: 'bits_per_byte')"),
        (json.dumps(RECORD | {"bits_per_byte": 1.3}), "not the record of a training (TypeError"),
        (json.dumps(RECORD | {"seconds": "long"}), "not the record of a training (TypeError"),
        (json.dumps(RECORD | {"command": None}), "not the record of a training (Attrib"),
        (None, "No such file"),
    ],
)
def test_a_record_that_is_broken_is_one_line(
    record: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = trained(tmp_path / "good", "", 1.2), trained(tmp_path / "broken", "", 1.3)
    before = (good / "README.md").read_bytes()
    (broken / "training.json").unlink()
    if record is not None:
        (broken / "training.json").write_text(record)
    for folders in ([good, broken], [broken, good]):
        with pytest.raises(SystemExit, match="2"), ended():
            note_candidates(folders[0], folders[1:])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {broken / 'training.json'}: ")
        assert said in line
    assert (good / "README.md").read_bytes() == before


def test_the_embedded_models_card_is_what_its_record_gives() -> None:
    folder = find_model("tiny")
    record = json.loads((folder / "training.json").read_text())
    assert (folder / "README.md").read_text() == card.render(record)
    assert record["inputs"]["least_gap"] >= record["inputs"]["gap_rule"] == 1e-4
    assert record["inputs"]["count"] == len(samples.read_inputs(folder / "inputs.bin")) >= 128
    assert "the best of 4 trainings" in card.render(record)


def test_the_embedded_model_is_that_of_the_recipe() -> None:
    assert json.loads((find_model("tiny") / "config.json").read_text()) == CONFIG
