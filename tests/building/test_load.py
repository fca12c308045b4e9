"""A load file says what was recorded, and anything else is one line that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.building.load import LayerLoad, Load, read_load, uniform
from lfm2kit.errors import Lfm2kitError
from tests.core.small import small_spec

LOAD = Load("small", 24, 10, (LayerLoad(2, 3, (10, 10, 5, 5, 0)), LayerLoad(3, 3, (6,) * 5)))


def written(path: Path, change: Callable[[dict[str, Any]], object] = lambda d: None) -> Path:
    document = json.loads(json.dumps(LOAD.document()))
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    load = read_load(written(tmp_path / "load.json"))
    assert load == LOAD
    assert load.shares() == [[1.0, 1.0, 0.5, 0.5, 0.0], [0.6] * 5]
    load.check(tmp_path / "load.json", small_spec())


def test_the_load_of_a_job_has_the_counts_of_each_rank_beside_the_sum(tmp_path: Path) -> None:
    first, second = LOAD.layers
    ranks = ((10, 4, 5, 0, 0), (0, 6, 0, 5, 0))
    of_job = replace(LOAD, layers=(first._replace(by_rank=ranks), second))
    path = tmp_path / "load.json"
    path.write_text(json.dumps(of_job.document()))
    assert read_load(path) == of_job
    fields, alone = of_job.document(), LOAD.document()
    assert fields["layers"][0].pop("ranks") == [{"counts": counts} for counts in ranks]
    assert fields == alone


def test_without_a_load_all_experts_are_alike() -> None:
    assert uniform(small_spec()) == [[3 / 5] * 5] * 2
    assert uniform(small_spec(num_dense_layers=4)) == []


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another kind": (
        lambda d: d.update(kind="lfm2kit rates"),
        "'lfm2kit rates', not 'lfm2kit load'",
    ),
    "no kind": (lambda d: d.pop("kind"), "not there"),
    "a later version": (lambda d: d.update(version=2), "version is 2"),
    "a version that is true": (
        lambda d: d.update(version=True),
        "version is True; expected 1, which",
    ),
    "no tokens": (lambda d: d.update(tokens=0), "tokens is 0"),
    "tokens that are not a number": (lambda d: d.update(tokens="10"), "tokens is '10'"),
    "a field too few": (lambda d: d.pop("model"), "model is missing"),
    "a field too many": (lambda d: d.update(experts=5), "experts is unknown"),
    "no layers": (lambda d: d.update(layers={}), "layers is {}"),
    "a layer that is a number": (lambda d: d["layers"].append(3), r"layers\[2\] is 3"),
    "a layer twice": (
        lambda d: d["layers"].append(d["layers"][0]),
        r"layers are numbered \[.*\]; expected each once",
    ),
    "a count below 0": (
        lambda d: d["layers"][1]["counts"].__setitem__(4, -1),
        r"counts\[4\] is -1",
    ),
    "a count above all tokens": (
        lambda d: d["layers"][0]["counts"].__setitem__(0, 11),
        r"layers\[0\].counts\[0\] is 11",
    ),
    "a fraction": (lambda d: d["layers"][0]["counts"].__setitem__(0, 1.5), "is 1.5"),
    "more choices than there are": (
        lambda d: d["layers"][0].update(counts=[10] * 5),
        "30 choices at most",
    ),
    "no counts": (lambda d: d["layers"][0].update(counts=[]), "1 to 1024 numbers"),
    "more chosen than there are": (
        lambda d: d["layers"][0].update(num_experts_per_tok=6),
        r"layers\[0\].num_experts_per_tok is 6",
    ),
    "ranks that are numbers": (lambda d: d["layers"][0].update(ranks=[1]), r"ranks\[0\] is 1"),
    "ranks that do not add up": (
        lambda d: d["layers"][1].update(ranks=[{"counts": [6, 6, 6, 6, 5]}]),
        r"layers\[1\].ranks is .*; expected counts that add up to those of the layer",
    ),
    "a rank with fewer experts": (
        lambda d: d["layers"][1].update(ranks=[{"counts": [6] * 4}]),
        r"layers\[1\].ranks\[0\].counts is .*; expected 5 numbers",
    ),
    "an unknown field of a rank": (
        lambda d: d["layers"][1].update(ranks=[{"counts": [6] * 5, "x": 1}]),
        r"layers\[1\].ranks\[0\].x is unknown",
    ),
    "an unknown field in a layer": (lambda d: d["layers"][0].update(x=1), r"layers\[0\].x is unk"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, name: str) -> None:
    change, said = CHANGES[name]
    path = written(tmp_path / "load.json", change)
    with pytest.raises(Lfm2kitError, match=said) as raised:
        read_load(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_experts": 6},
            r"\(small\): its layer 2 has 3 of 5 experts, not 3 of 6",
        ),
        ({"num_experts_per_tok": 2}, "3 of 5 experts, not 2 of 5"),
        ({"num_dense_layers": 1}, "its layer 1 has no experts"),
        ({"num_dense_layers": 3}, "its layer 2 has 3 of 5 experts, not none"),
        ({"hidden_size": 32}, "hidden_size 24"),
    ],
)
def test_a_load_of_another_model_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Lfm2kitError, match=said):
        LOAD.check(Path("load.json"), small_spec(**changes))
