"""`lfm2kit tokenize`: ids with their text, chats, JSON, and bad input in one line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.chat.folders import GOLDEN, folder_with, golden_tokenizer
from tests.checkpoint.folders import ORACLE
from tests.checkpoint.typed import Cli

TEMPLATE = (GOLDEN / "lfm2.jinja").read_text()


def give(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def shown(out: str) -> list[tuple[int, str]]:
    """Return the ids and texts of the lines."""
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    return [(int(number), text) for number, text in lines]


def test_each_id_is_shown_with_its_text(cli: Cli, tmp_path: Path) -> None:
    done = cli("tokenize", "--model", folder_with(tmp_path), "a<|im_end|>\n")
    assert done.code == 0, done
    ids = golden_tokenizer().encode("a<|im_end|>\n")
    assert [number for number, _ in shown(done.out)] == ids
    assert shown(done.out)[:2] == [(1, "'<|startoftext|>'"), (ids[1], "'a'")]
    assert shown(done.out)[-1][1] == r"'\n'"


def test_part_of_a_character_is_shown_as_bytes(cli: Cli, tmp_path: Path) -> None:
    done = cli("tokenize", "--model", folder_with(tmp_path), "\N{OGHAM SPACE MARK}")
    texts = [text for _, text in shown(done.out)[1:]]
    assert len(texts) > 1
    assert texts[0].startswith(r"b'\xe1")


def test_special_tokens_are_tokens_where_they_are_asked_for(cli: Cli, tmp_path: Path) -> None:
    done = cli("tokenize", "--model", folder_with(tmp_path), "--special", "a<|im_end|>")
    assert shown(done.out)[-1] == (7, "'<|im_end|>'")


@pytest.mark.parametrize("special", [False, True])
def test_a_chat_is_what_its_template_writes(special: bool, cli: Cli, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TEMPLATE)
    flags = ["--chat", *(["--special"] if special else []), "--json", "-"]
    done = cli("tokenize", "--model", folder, *flags, "a<|im_end|>")
    ids = json.loads(done.out)["ids"]
    whole = "<|startoftext|><|im_start|>user\na<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert golden_tokenizer().decode(ids, special=True) == whole
    assert ids.count(7) == 1 + special


def test_json_has_the_bytes_of_each_token(cli: Cli, tmp_path: Path) -> None:
    done = cli("tokenize", "--model", folder_with(tmp_path), "--json", "-", "é")
    fields = json.loads(done.out)
    assert fields["tokens"][0] == {
        "id": 1,
        "text": "<|startoftext|>",
        "bytes": b"<|startoftext|>".hex(),
        "special": True,
    }
    assert "".join(token["bytes"] for token in fields["tokens"][1:]) == "é".encode().hex()
    assert fields["ids"] == [token["id"] for token in fields["tokens"]]


def test_a_dash_reads_stdin_as_it_is(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, "é\r\n".encode())
    done = cli("tokenize", "--model", folder_with(tmp_path), "--json", "-", "-")
    ids = json.loads(done.out)["ids"]
    assert golden_tokenizer().decode(ids) == "é\r\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"ab\xffc", "stdin is not UTF-8: byte 0xff at 2"), (b"a\xe2\x82", "byte 0xe2 at 1")],
)
def test_stdin_that_is_not_utf_8_is_one_line(
    data: bytes, words: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, data)
    cli("tokenize", "--model", folder_with(tmp_path), "-").assert_fails(words)


def test_too_much_and_no_stdin_are_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path)
    monkeypatch.setattr("lfm2kit.bounds.TEXT", 3)
    give(monkeypatch, b"abcd")
    cli("tokenize", "--model", folder, "-").assert_fails("stdin has more than the 3 bytes")
    cli("tokenize", "--model", folder, "abcd").assert_fails("a text of 4 characters")
    monkeypatch.setattr(sys, "stdin", None)
    cli("tokenize", "--model", folder, "-").assert_fails("stdin is closed")


def test_an_argument_that_is_not_utf_8_is_one_line(cli: Cli, tmp_path: Path) -> None:
    cli("tokenize", "--model", folder_with(tmp_path), "a\udcff").assert_fails("give UTF-8 text")


def test_a_model_without_tokenizer_or_template_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cli("tokenize", "--model", tmp_path / "empty", "a").assert_fails("has no tokenizer.json")
    cli("tokenize", "--model", folder_with(tmp_path), "--chat", "a").assert_fails(
        "has no chat template"
    )
    cli("tokenize", "--model", tmp_path / "nosuch", "a").assert_fails("no model")


def test_a_template_that_refuses_is_one_line(cli: Cli, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "{{ raise_exception('two\nlines') }}")
    cli("tokenize", "--model", folder, "--chat", "a").assert_fails("refuses these messages: two")


def test_another_models_tokenizer_is_one_line(cli: Cli, tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    config = json.loads((ORACLE / "experts_5_top_1" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    cli("tokenize", "--model", folder, "a").assert_fails("go up to 422", "embedding has 80 rows")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    assert cli("tokenize", "--model", folder, "a").code == 0
