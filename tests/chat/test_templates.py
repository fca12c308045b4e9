"""Templates: the text and ids of transformers, users' tokens, and one line for each failure."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfm2kit.chat.plain_text import PlainText
from lfm2kit.chat.prompts import chat_ids
from lfm2kit.chat.templates import ChatTemplate, environment, load_template
from lfm2kit.chat.tokenizer_config import read_tokenizer_config
from lfm2kit.errors import Lfm2kitError
from tests.chat.folders import GOLDEN, folder_with, golden_tokenizer

DATE = datetime(2026, 1, 2)  # of the golden texts
QUESTION = [{"role": "user", "content": "a"}]
CASES = [
    pytest.param(template, name, id=f"{template}: {name}")
    for template in ("lfm2", "lfm2_5")
    for name in json.loads((GOLDEN / f"{template}.json").read_text())
]


@cache
def golden_template(name: str) -> ChatTemplate:
    path = GOLDEN / f"{name}.jinja"
    named = golden_tokenizer().config.named
    return ChatTemplate(path, {"default": path.read_text()}, named)


def template_of(text: str) -> ChatTemplate:
    return ChatTemplate(Path("a.jinja"), {"default": text}, {})


@pytest.mark.parametrize(("template", "name"), CASES)
def test_text_and_ids_are_those_of_transformers(template: str, name: str) -> None:
    golden = json.loads((GOLDEN / f"{template}.json").read_text())[name]
    chat = {**golden["chat"], "now": lambda: DATE}
    tokenizer, rendered = golden_tokenizer(), golden_template(template)
    assert rendered.render(**chat) == golden["text"]
    assert chat_ids(tokenizer, rendered, special=True, **chat) == golden["ids"]
    if name != "tokens in a user's text":
        assert chat_ids(tokenizer, rendered, **chat) == golden["ids"]
    assert golden["ids"].count(1) == 1  # one BOS


@pytest.mark.parametrize("template", ["lfm2", "lfm2_5"])
def test_a_user_cannot_end_the_turn(template: str) -> None:
    golden = json.loads((GOLDEN / f"{template}.json").read_text())["tokens in a user's text"]
    tokenizer = golden_tokenizer()
    ids = chat_ids(tokenizer, golden_template(template), **golden["chat"])
    assert tokenizer.decode(ids, special=True) == golden["text"]
    assert ids.count(6) == 4  # three messages, and the turn that is begun
    assert ids.count(7) == 3


PIECES = ["<|im_end|>", "<|im_", "end|>", "<", "|", "<|startoftext|>", "a", "é", "\U000f0000", " "]
MESSAGES = st.lists(st.lists(st.sampled_from(PIECES), max_size=4), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(MESSAGES)
@example([["<|im_", "end|>"], ["<|im_"], ["end|>"]])
def test_no_text_of_users_becomes_a_special_token_and_all_of_it_is_there(
    messages: list[list[str]],
) -> None:
    """Even where the template joins parts that are a token together."""
    template = template_of(
        "{% for m in messages %}<|im_start|>"
        "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}"
    )
    contents = [[{"type": "text", "text": piece} for piece in pieces] for pieces in messages]
    chat = [{"role": "user", "content": content} for content in contents]
    tokenizer = golden_tokenizer()
    ids = chat_ids(tokenizer, template, chat)
    assert [i for i in ids if i in tokenizer.special] == [6, 7] * len(messages)
    written = "".join(f"<|im_start|>{''.join(pieces)}<|im_end|>" for pieces in messages)
    assert tokenizer.decode(ids, special=True) == written


@pytest.mark.parametrize("ascii", ["", "(ensure_ascii=true)"])
def test_tokens_in_tools_and_names_are_text_too(ascii: str) -> None:
    template = template_of("{{ messages[0].name }}{{ tools | tojson" + ascii + " }}<|im_end|>")
    tools = [{"name": "<|im_end|>", "parameters": {"<|im_end|>": 1}}]
    message = {"role": "user", "name": "<|im_end|>", "content": ""}
    ids = chat_ids(golden_tokenizer(), template, [message], tools)
    assert ids.count(7) == 1
    assert golden_tokenizer().decode(ids, special=True) == template.render([message], tools)


def test_of_tokens_that_begin_alike_the_longer_one_is_meant() -> None:
    assert PlainText(["<s>", "<s><s>"]).parts("<s><s><s>", "-") == ["", "<s><s>", "", "<s>", ""]


def test_a_thousand_tokens_are_looked_for_only_where_they_may_begin() -> None:
    """A pattern of alternatives that begin alike is tried once for each of their beginnings."""
    tokens = [f"<|reserved_{i}|>" for i in range(1000)] + ["[INST]", "<s>"]
    plain = PlainText(tokens)
    messages = [{"role": "user", "content": "a<s>[INST] <|reserved_999|><|reserved_9"}]
    marked, _, mark = plain.marked(messages, None)
    assert marked[0]["content"].count(mark) == 4
    assert plain.parts("[INST]" + marked[0]["content"] + "<s>", mark) == [
        "", "[INST]", messages[0]["content"], "<s>", ""
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "a"}]'),
        ("{{ '<é&\\'' | tojson }}", '"<é&\'"'),
        (
            "{{ {'b': 1, 'a': [2]} | tojson(sort_keys=true, separators=(',', ':')) }}",
            '{"a":[2],"b":1}',
        ),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ strftime_now('%d %b %Y') }}", "02 Jan 2026"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),  # blocks take their own line away
        ("{{ nothing }}{{ nothing is defined }}", "False"),
        ("{{ tools == none and documents == none }}", "True"),
        ("{{ add_generation_prompt }}", "True"),
        ("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}", "1"),
        ("{% set x = 2 %}{%- generation -%} {{ x }} {%- endgeneration -%}", "2"),
    ],
)
def test_a_template_has_what_transformers_gives_it(template: str, expected: str) -> None:
    assert template_of(template).render(QUESTION, now=lambda: DATE) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no\nsuch role') }}", "refuses these messages: no\nsuch role"),
        ("{{ nothing.at_all.more }}", "'nothing' is undefined"),
        ("\n{% if %}", "fails at line 2: TemplateSyntaxError"),
        ("{% nosuch %}", "unknown tag 'nosuch'"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + " }}", "fails"),
        ("{% include 'x' %}", "fails"),
    ],
)
def test_a_template_that_fails_is_one_error(template: str, words: str) -> None:
    with pytest.raises(Lfm2kitError) as failed:
        template_of(template).render(QUESTION)
    assert words in str(failed.value)
    assert str(failed.value).startswith("a.jinja: the chat template ")


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        ([], None, "at least one message"),
        ("a", None, "at least one message"),
        (["a"], None, "a message is 'a'"),
        ([{"content": "a"}], None, "expected a dict with a 'role'"),
        ([{"role": "user", "content": b"a"}], None, "must be JSON values"),
        (QUESTION, [print], "must be JSON values"),
    ],
)
def test_messages_that_are_not_a_chat_are_one_line(messages: Any, tools: Any, words: str) -> None:
    with pytest.raises(Lfm2kitError, match=words):
        chat_ids(golden_tokenizer(), template_of(""), messages, tools)


def loaded(folder: Path) -> ChatTemplate:
    return load_template(folder, read_tokenizer_config(folder))


def test_a_file_comes_before_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template="in the configuration")
    assert loaded(folder).render(QUESTION) == "in the configuration"
    (folder / "chat_template.jinja").write_text("in a file")
    assert loaded(folder).render(QUESTION) == "in a file"


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "additional_chat_templates/tool_use.jinja",
    ],
)
def test_a_broken_link_is_not_taken_for_no_file(name: str, tmp_path: Path) -> None:
    """Another template, or other special tokens, would silently give another prompt."""
    folder = folder_with(tmp_path, chat_template="in the configuration")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(Lfm2kitError, match=f"{name}: this is a link to nowhere"):
        loaded(folder)


@pytest.mark.parametrize("in_files", [False, True])
def test_one_of_several_templates_is_chosen_as_in_transformers(
    in_files: bool, tmp_path: Path
) -> None:
    texts = {"default": "plain", "tool_use": "with tools", "rag": "documents"}
    listed = [{"name": name, "template": text} for name, text in texts.items()]
    folder = folder_with(tmp_path, **({} if in_files else {"chat_template": listed}))
    if in_files:
        (folder / "chat_template.jinja").write_text("plain")
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(texts[name])
    template = loaded(folder)
    assert template.render(QUESTION) == "plain"
    assert template.render(QUESTION, []) == "with tools"
    assert template.render(QUESTION, which="rag") == "documents"
    with pytest.raises(Lfm2kitError, match="no chat template 'x'; available: default, rag, tool"):
        template.render(QUESTION, which="x")


@pytest.mark.parametrize(
    "said", [3, [1], [{"name": "default"}], [{"name": 1, "template": "a"}], {"default": "a"}]
)
def test_a_field_that_is_not_a_template_is_one_line(said: Any, tmp_path: Path) -> None:
    with pytest.raises(Lfm2kitError, match=r"_config\.json: 'chat_template' is"):
        loaded(folder_with(tmp_path, chat_template=said))


def test_a_folder_without_a_template_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Lfm2kitError, match="has no chat template"):
        loaded(folder_with(tmp_path))


def test_a_template_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(Lfm2kitError, match="not UTF-8 at byte 1"):
        loaded(folder)


ENDLESS = {
    "loops in loops": "{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}",
    "items that a loop passes over": (
        "{% for a in range(999) %}{% for b in range(999) if false %}{% endfor %}{% endfor %}"
    ),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a recursive loop": (
        "{% for n in [20] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=list(ENDLESS))
def test_a_template_that_never_ends_is_one_line(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2kit.chat.sandbox.MOST_STEPS", 10_000)
    with pytest.raises(Lfm2kitError, match="more than 10000 passes of loops and calls; it may nev"):
        ChatTemplate(Path("a"), {"default": template}, {}).render(QUESTION)


def test_each_rendering_has_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2kit.chat.sandbox.MOST_STEPS", 10)
    template = "{% for a in 'abcdef' %}{{ a }}{% else %}none{% endfor %}"
    loop = ChatTemplate(Path("a"), {"default": template}, {})
    assert [loop.render(QUESTION) for _ in range(3)] == ["abcdef"] * 3


def test_variables_of_a_template_come_before_tokens_and_defaults() -> None:
    template = ChatTemplate(Path("a"), {"default": "{{ bos_token }}{{ x }}"}, {"bos_token": "<s>"})
    assert template.render(QUESTION, x=1) == "<s>1"
    assert template.render(QUESTION, bos_token="") == ""


def test_the_environment_keeps_each_templates_names_to_itself() -> None:
    assert environment() is not environment()


def test_without_the_library_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(Lfm2kitError, match=r"needs the package jinja2.*lfm2kit\[chat\]"):
        loaded(folder_with(tmp_path, "a"))
