"""The tokenizer: special tokens in text, one BOS, what a folder says, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from lfm2kit.chat.tokenizer import load_tokenizer
from lfm2kit.errors import Lfm2kitError
from tests.chat.folders import GOLDEN, folder_with, golden_tokenizer

BOS, IM_END = 1, 7
BOS_FIRST = [
    {"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
]


def test_special_tokens_in_text_are_text_unless_asked() -> None:
    tokenizer = golden_tokenizer()
    assert tokenizer.encode("a<|im_end|>", special=True)[-1] == IM_END
    plain = tokenizer.encode("a<|im_end|>")
    assert not set(plain[1:]) & set(tokenizer.special)
    assert tokenizer.decode(plain) == "a<|im_end|>"
    assert tokenizer.encode("a<|im_end|>", special=True)[-1] == IM_END  # no call changes another


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("", {}, [BOS]),
        ("", {"bos": False}, []),
        ("<|startoftext|>", {"special": True}, [BOS]),
        ("<|startoftext|>", {"special": True, "bos": False}, [BOS]),
        ("<|startoftext|><|startoftext|>", {"special": True, "bos": False}, [BOS, BOS]),
    ],
)
def test_a_text_begins_with_one_bos(
    text: str, options: dict[str, Any], expected: list[int]
) -> None:
    assert golden_tokenizer().encode(text, **options) == expected


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("a\0b\r\n\t  c")
@example("<|im_end|><|startoftext|>")
def test_any_text_comes_back(text: str) -> None:
    tokenizer = golden_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_and_pieces_beyond_the_vocabulary_have_no_text() -> None:
    tokenizer = golden_tokenizer()
    assert tokenizer.decode([tokenizer.size, 2**31]) == ""
    assert tokenizer.token_bytes(tokenizer.size) == b""


def test_token_bytes_are_those_of_the_text() -> None:
    tokenizer = golden_tokenizer()
    ids = tokenizer.encode("né \N{GRINNING FACE}日本", bos=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "né \N{GRINNING FACE}日本"


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_one_line() -> None:
    tokenizer = golden_tokenizer()
    tokenizer.check_fits(tokenizer.size)
    with pytest.raises(Lfm2kitError, match=r"ids go up to 422, but .* has 422 rows") as refused:
        tokenizer.check_fits(tokenizer.size - 1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no tokenizer.json"),
        ("", "the file is empty"),
        ("{", "cannot use it"),
        ("{}", "cannot use it"),
        ("[1, 2]", "cannot use it"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "cannot use it"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "cannot use it"),
        ("\xff\xfe", "tokenizer.json"),
        ("<html>", "web page"),
    ],
)
def test_a_missing_or_broken_tokenizer_is_one_line(
    content: str | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(Lfm2kitError, match=words) as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # while loading
        ("post_processor", {"type": "TemplateProcessing", "single": BOS_FIRST, "pair": []}),
        ("model", {"type": "Unigram", "vocab": [["b", 0.0]]}),
    ],
)
def test_a_panic_of_the_library_is_one_line(name: str, value: Any, tmp_path: Path) -> None:
    path = folder_with(tmp_path) / "tokenizer.json"
    damaged = json.loads(path.read_text()) | {name: value}
    if name == "post_processor":
        damaged[name]["special_tokens"] = {}
    path.write_text(json.dumps(damaged))
    with pytest.raises(Lfm2kitError, match="cannot use it") as refused:
        load_tokenizer(tmp_path).encode("a")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bos_token", 3),
        ("bos_token", {"text": "a"}),
        ("add_bos_token", "yes"),
        ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"x": {"content": "a"}}),
        ("added_tokens_decoder", {"1": "a", "2": None}),
        ("added_tokens_decoder", {"1": {"content": "a", "special": 1}}),
    ],
)
def test_a_wrong_field_of_the_configuration_is_one_line(
    field: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(Lfm2kitError, match=f"tokenizer_config.json: '{field}' (is|has)"):
        load_tokenizer(folder_with(tmp_path, **{field: value}))


def test_the_configuration_may_say_which_tokens_are_put_around_a_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, add_bos_token=False, add_eos_token=True))
    assert tokenizer.encode("")[-1:] == [IM_END]
    assert BOS not in tokenizer.encode("")


def test_named_and_added_tokens_that_tokenizer_json_lacks_get_the_next_ids(tmp_path: Path) -> None:
    added = {"500": {"content": "<x>", "special": False}, "1": {"content": "<|startoftext|>"}}
    folder = folder_with(tmp_path, pad_token={"content": "<p>"}, added_tokens_decoder=added)
    tokenizer, size = load_tokenizer(folder), golden_tokenizer().size
    assert tokenizer.encode("<x><p>", special=True, bos=False) == [size, size + 1]
    assert tokenizer.encode("<x>", bos=False) == [size]  # added, but not special
    assert size + 1 in tokenizer.special


def test_an_older_folder_names_its_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    named = {"bos_token": {"content": "<|im_start|>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    assert load_tokenizer(folder).config.named["bos_token"] == "<|im_start|>"


def test_a_length_to_cut_or_fill_texts_to_is_ignored(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    inner = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(folder / "tokenizer.json"))
    for text in ("a", "the weather in Paris is sunny"):
        assert load_tokenizer(folder).encode(text) == golden_tokenizer().encode(text)


def test_text_that_is_not_unicode_is_one_line() -> None:
    with pytest.raises(Lfm2kitError, match=r"character 2 is half of a surrogate pair"):
        golden_tokenizer().encode("ab\udcff")


def test_a_vocabulary_with_holes_is_as_large_as_its_largest_id(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    inner.decoder = decoders.Fuse()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.size == 10
    assert tokenizer.token_bytes(9) == b"b"


def test_without_the_library_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Lfm2kitError, match=r"needs the package tokenizers.*lfm2kit\[chat\]"):
        load_tokenizer(folder_with(tmp_path))
