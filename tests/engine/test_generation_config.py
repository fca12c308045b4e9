"""The defaults that a checkpoint's generation_config.json gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfm2kit.engine.generation_config import (
    NAME,
    GenerationConfig,
    read_generation_config,
)
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError

OF_LFM2 = """{"_from_model_config": true, "bos_token_id": 1, "do_sample": true, "eos_token_id": 7,
"min_p": 0.15, "pad_token_id": 0, "repetition_penalty": 1.05, "temperature": 0.3,
"transformers_version": "4.57.0"}"""


def read(folder: Path, text: str) -> GenerationConfig:
    (folder / NAME).write_text(text)
    return read_generation_config(folder)


def test_the_file_of_lfm2(tmp_path: Path) -> None:
    expected = Sampling(temperature=0.3, min_p=0.15, repetition_penalty=1.05)
    assert read(tmp_path, OF_LFM2) == (expected, (7,))


def test_no_file_and_an_empty_one_mean_the_defaults(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == (Sampling(), ())
    assert read(tmp_path, "{}") == (Sampling(), ())
    assert read(tmp_path, '{"temperature": null, "eos_token_id": null}') == (Sampling(), ())


def test_do_sample_false_is_greedy_and_keeps_what_greedy_uses(tmp_path: Path) -> None:
    text = '{"do_sample": false, "temperature": 0.3, "top_k": 5, "repetition_penalty": 1.1}'
    assert read(tmp_path, text).sampling == Sampling(temperature=0, repetition_penalty=1.1)


def test_every_setting_is_read(tmp_path: Path) -> None:
    text = '{"do_sample": true, "temperature": 1, "top_k": 50, "top_p": 0.9, "min_p": 0.1}'
    assert read(tmp_path, text).sampling == Sampling(top_k=50, top_p=0.9, min_p=0.1)


def test_all_eos_ids_are_kept_once(tmp_path: Path) -> None:
    assert read(tmp_path, '{"eos_token_id": [7, 2, 7]}').eos_ids == (7, 2)


def test_config_json_names_the_eos_ids_where_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "temperature": 5}')
    assert read_generation_config(tmp_path) == (Sampling(), (7,))
    assert read(tmp_path, "{}").eos_ids == (7,)
    assert read(tmp_path, '{"eos_token_id": 2}').eos_ids == (2,)


def test_a_link_to_nothing_is_not_the_same_as_no_file(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "gone")
    with pytest.raises(Lfm2kitError, match=NAME.replace(".", r"\.")):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable JSON"),
        ("[]", "expected a JSON object"),
        ('{"temperature": NaN}', "NaN is not a JSON number"),
        ('{"temperature": 1e999}', "beyond the largest float"),
        ('{"temperature": -1}', "temperature=-1: expected 0, which is greedy"),
        ('{"do_sample": false, "temperature": -1}', "temperature=-1: expected"),
        ('{"top_k": -1}', "top_k=-1: expected"),
        ('{"top_p": 0}', "top_p=0: expected"),
        ('{"min_p": "0.1"}', "min_p='0.1': expected"),
        ('{"repetition_penalty": 0}', "repetition_penalty=0: expected"),
        ('{"do_sample": 1}', "do_sample is 1; expected true or false"),
        ('{"eos_token_id": -1}', "eos_token_id is -1; expected a token id from 0"),
        ('{"eos_token_id": true}', "eos_token_id is True; expected"),
        ('{"eos_token_id": [7, "2"]}', "eos_token_id is [7, '2']; expected"),
        ('{"eos_token_id": 99999999999}', "eos_token_id is 99999999999; expected"),
    ],
)
def test_a_broken_file_is_one_line_that_begins_with_its_path(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(Lfm2kitError) as caught:
        read(tmp_path, text)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / NAME}: ")
    assert says in line
    assert "\n" not in line


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(Lfm2kitError, match=NAME.replace(".", r"\.")):
        read_generation_config(tmp_path)
