"""Tool calls of both formats, and all that is neither and stays text."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfm2kit import bounds
from lfm2kit.chat.tool_calls import BEGIN, END, ToolCall, read_tool_calls, split_tool_calls

NESTED = {"a": [1, -2.5, {"b": None, "c": [True, False]}], "d": "é'\"\n"}


@pytest.mark.parametrize(
    ("written", "name", "arguments"),
    [
        ("[f()]", "f", {}),
        ("f(a=1)", "f", {"a": 1}),
        ('[a.b.c(x="y")]', "a.b.c", {"x": "y"}),
        ("[f(a=[1, -2.5, {'b': None, 'c': [True, False]}])]", "f", {"a": NESTED["a"]}),
        ('[f(a=[true, false, null, {"b": true}])]', "f", {"a": [True, False, None, {"b": True}]}),
        ("[f(a=(1, 'x'), b=())]", "f", {"a": [1, "x"], "b": []}),
        ("f(a='it\\'s', b=\"\\n\", c='x' 'y')", "f", {"a": "it's", "b": "\n", "c": "xy"}),
        ("f(a='two\nlines\r\n', b=1)", "f", {"a": "two\nlines\r\n", "b": 1}),
        ("[\n  f(\n    a=1,\n  ),\n]", "f", {"a": 1}),
        (r"f(a='\d')", "f", {"a": r"\d"}),
        ('[{"name": "a-b", "arguments": {"x": true, "in": null}}]', "a-b", {"x": True, "in": None}),
        ('{"name": "f", "arguments": {"a": "\\u00e9 \\/"}}', "f", {"a": "é /"}),
        ('[{"name": "f", "arguments": {"a": "two\nlines"}, "id": "1"}]', "f", {"a": "two\nlines"}),
        (json.dumps([{"name": "f", "arguments": NESTED}]), "f", NESTED),
    ],
)
def test_a_call_is_a_name_and_arguments(written: str, name: str, arguments: Any) -> None:
    assert read_tool_calls(written) == [ToolCall(name, arguments)]
    assert split_tool_calls(f"a{BEGIN}{written}{END}b") == ("ab", [ToolCall(name, arguments)])


def test_several_calls_keep_their_order_and_the_text_around_them() -> None:
    one = f"{BEGIN}[f(a=1), g.h()]{END}"
    other = f'{BEGIN}[{{"name": "k", "arguments": {{}}}}]{END}'
    text, calls = split_tool_calls(f"x{one}y{other}z")
    assert text == "xyz"
    assert calls == [ToolCall("f", {"a": 1}), ToolCall("g.h", {}), ToolCall("k", {})]


NOT_CALLS = [
    "",
    "[]",
    "f",
    "1",
    "f(1)",
    "f(**{'a': 1})",
    "f(a=1, a=2)",
    "f()()",
    "'f'()",
    "[f(a=1), 2]",
    "f(a=b)",
    "f(a=g())",
    "f(a=b'x')",
    "f(a=...)",
    "f(a=1j)",
    "f(a=f'{x}')",
    "f(a=1 + 1)",
    "f(a=-True)",
    "f(a=lambda: 0)",
    "f(a={1: 2})",
    "f(a={**x})",
    "f(a=1e999)",
    "f(a='\\ud800')",
    "f(a='\0')",
    "f(class=1)",
    "f(a=0x" + "f" * 9000 + ")",
    "__import__('os').system('true')",
    "[{'name': 'f'}]",
    '[{"name": "f"}]',
    '[{"name": "", "arguments": {}}]',
    '[{"name": "f", "arguments": "{}"}]',
    '[{"name": "f", "arguments": {"a": NaN}}]',
    '[{"name": "f", "arguments": {"a": "\\ud800"}}]',
    '[{"name": "f", "arguments": {}}, 1]',
    "\ud800",
    "f(a='",
]
SIZE = bounds.TOOL_CALL - 100
DEEP = [
    *(sign * SIZE for sign in ".+-~([{\"'\\*"),
    *(f"f(a={sign * SIZE}1)" for sign in "+-~(["),
    "f(a=" + "[" * 30_000 + "]" * 30_000 + ")",
    '{"a":' * 9000 + "1" + "}" * 9000,
    "[" * 32_000 + "]" * 32_000,
    "f(a=" + "not " * 15_000 + "1)",
    "f(a=1" + "+1" * 30_000 + ")",
    "f" + ".b" * 30_000 + "(a=1, b=[)",
    "f" + "()" * 30_000,
    "lambda:" * 8000 + "0",
    "'" + "\\'" * 30_000,
    "a," * 30_000,
]


@pytest.mark.parametrize("written", NOT_CALLS)
def test_what_is_not_a_call_stays_text(written: str) -> None:
    text = f"a{BEGIN}{written}{END}b"
    assert split_tool_calls(text) == (text, [])


@pytest.mark.parametrize("written", DEEP, ids=lambda written: f"{written[:8]}...")
def test_nothing_is_too_deep_or_too_long_to_stay_text(written: str) -> None:
    assert len(written) <= bounds.TOOL_CALL
    assert read_tool_calls(written) == []


@pytest.mark.parametrize("sign", [".", "+", "-"])
def test_more_than_64_kb_is_not_parsed(sign: str) -> None:
    assert read_tool_calls(sign * 100_000) == []
    room = bounds.TOOL_CALL - len("f(a='')")
    assert len(read_tool_calls(f"f(a='{'x' * room}')")) == 1
    assert read_tool_calls(f"f(a='{'x' * (room + 1)}')") == []
    assert read_tool_calls(f"f(a='{'é' * (room // 2 + 1)}')") == []  # bytes count


@pytest.mark.parametrize("text", [BEGIN, END, f"{BEGIN}f()", f"f(){END}", f"{END}f(){BEGIN}"])
def test_tokens_without_their_other_are_text(text: str) -> None:
    assert split_tool_calls(text) == (text, [])


def test_warnings_of_python_about_a_models_text_do_not_show() -> None:
    for told_to in ("error", "always"):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter(told_to)
            assert read_tool_calls(r"f(a='\d')") == [ToolCall("f", {"a": r"\d"})]
        assert not shown


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["f", "a.b", "weather.now"])
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b", "city"]), VALUES)


@settings(max_examples=100, deadline=None)
@given(NAMES, ARGUMENTS)
def test_what_is_written_is_read(name: str, arguments: dict[str, Any]) -> None:
    call = repr([ToolCall(name, arguments)])  # 1 is equal to True
    pythonic = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    assert repr(read_tool_calls(f"[{name}({pythonic})]")) == call
    as_json = json.dumps([{"name": name, "arguments": arguments}])
    assert repr(read_tool_calls(as_json)) == call


PIECES = [
    "f",
    "(",
    ")",
    "a=",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "\\",
    "1",
    "-",
    ".",
    ",",
    ":",
    "\n",
    " ",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "name", "arguments", BEGIN, END]), max_size=25))
@example([BEGIN, "f", "(", ")", END])
def test_any_text_is_split_without_an_error(pieces: list[str]) -> None:
    text, calls = split_tool_calls("".join(pieces))
    assert text == "".join(pieces) or calls
