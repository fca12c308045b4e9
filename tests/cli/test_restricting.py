"""`--logit-bias`, `--json-schema`, `--regex`, `--grammar`: files and texts, and bad ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.typed import Cli, Typed
from tests.generating.folders import give_constraints_all_the_time, loaded, model_folder

SCHEMA = {"enum": ["tea", "whales", 1]}
GRAMMAR = 'start: DIGITS " + " DIGITS\nDIGITS: /[0-9]{2}/'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("model") / "small")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "sum.lark").write_text(GRAMMAR)
    (folder / "latin").write_bytes(b"start: \xff")
    (folder / "bom").write_bytes(b'\xef\xbb\xbf{"type": "null"}')
    return folder


@pytest.fixture(autouse=True)
def all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    give_constraints_all_the_time(monkeypatch)


@pytest.fixture
def generate(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Typed]:
    monkeypatch.chdir(folder)

    def typed(*words: object) -> Typed:
        options = ["-m", folder, "-b", "reference", "--max-tokens", 9, "--seed", 1]
        return cli("generate", "a", *options, *words)

    return typed


def test_answers_obey_what_is_typed(generate: Callable[..., Typed], folder: Path) -> None:
    expected = [*loaded(folder).generate(["a"], json_schema=SCHEMA, seed=1, max_tokens=9)]
    for schema in ("schema.json", json.dumps(SCHEMA)):
        assert generate("--json-schema", schema).out.splitlines() == expected
    assert re.fullmatch("[ab]{3}\n", generate("--regex", "[ab]{3}").out)
    assert re.fullmatch(r"\d\d \+ \d\d\n", generate("--grammar", "sum.lark").out)
    biased = generate("--logit-bias", "65=1000", "--logit-bias", "7=-1000", "--json", "-")
    (answer,) = loaded(folder).answers("a", logit_bias={65: 1000, 7: -1000}, max_tokens=9)
    assert json.loads(biased.out)["answers"][0]["text"] == answer.text


def test_a_chat_obeys_as_well(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", folder, "-b", "reference", "--context", 128, "--regex", "[ab]{3}"]
    monkeypatch.setattr("sys.stdin", (folder / "schema.json").open())
    assert re.fullmatch("[ab]{3}\n", cli("chat", *words).out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--logit-bias", "5"], "--logit-bias 5: expected a token id and a number, such as"),
        (["--logit-bias", "x=1"], "--logit-bias x=1: expected a token id and a number"),
        *[
            (["--logit-bias", pair], "expected a token id and a number, such as --logit-bias 42=-5")
            for pair in ("5=nan", "5 = 1", " 5=1", "5=1_0", "-5=1", "5=1=2", "5=0x1", "\u0665=1")
        ],
        (["--logit-bias", "5=1001"], "--logit-bias: the bias of token 5 is 1001.0; expected"),
        (["--logit-bias", "423=1"], "--logit-bias: token id 423 is outside the vocabulary of 423"),
        (["--logit-bias", "5=1", "--logit-bias", "5=2"], "5=2: token 5 has a bias already"),
        (["--regex", "("], "the regex cannot be used: unclosed group"),
        (["--json-schema", "{"], "the JSON schema is not JSON"),
        (["--json-schema", '{"type": 5}'], "the JSON schema cannot be used: type must be"),
        (["--json-schema", "nosuch.json"], "nosuch.json: No such file"),
        (["--grammar", "nosuch.lark"], "nosuch.lark: No such file"),
        (["--grammar", "."], ".: this is a directory"),
        (["--grammar", "schema.json"], "the grammar is JSON; expected rules"),
        (["--grammar", "latin"], "latin: not UTF-8"),
        (["--grammar", "bom"], "bom: a byte order mark comes first; save it as UTF-8 without one"),
        (["--json-schema", "bom"], "bom: a byte order mark comes first"),
        (["--stop", "a\udcff"], "--stop 'a\\udcff': not UTF-8"),
        (["--chat", "--system", "a\udcff"], "--system 'a\\udcff': not UTF-8"),
        (["--regex", "a\udcff"], "the regex's character 1 is half of a surrogate pair, or was a"),
        (["--regex", "a", "--grammar", "sum.lark"], "--regex and --grammar: give only one"),
        (["--grammar", "sum.lark", "--json", "sum.lark"], "this file is the schema or the grammar"),
        (["--grammar", "/dev/fd/0", "--ranks", 2], "--grammar /dev/fd/0: each rank has another"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[object], said: str, generate: Callable[..., Typed], folder: Path
) -> None:
    generate(*words).assert_fails(said)
    assert (folder / "sum.lark").read_text() == GRAMMAR
