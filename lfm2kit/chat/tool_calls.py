"""Reads the calls of tools that a model writes, as Python calls or as a list in JSON.

Both stand between tokens: `[weather.now(city="Hanoi", days=2)]` and
`[{"name": "weather.now", "arguments": {"city": "Hanoi", "days": 2}}]`.  Nothing is evaluated, and
what is neither stays text.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lfm2kit import bounds

TAGS = BEGIN, END = "<|tool_call_start|>", "<|tool_call_end|>"
# A string without an end reaches to the end of the text, which keeps the time linear.
STRING = re.compile(r"""'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?""", re.DOTALL)
NAMED = {"true": True, "false": False, "null": None}  # JSON's, among Python's own


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool's name and its arguments, which are values of JSON."""

    name: str
    arguments: dict[str, Any]


def split_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Return the text around calls, and the calls in the order in which they were written.

    The text must have the special tokens around calls: `TextStream(..., special=TAGS)`.
    """
    said, calls, position = [], list[ToolCall](), 0
    while (begin := text.find(BEGIN, position)) >= 0 and (end := text.find(END, begin)) >= 0:
        read = read_tool_calls(text[begin + len(BEGIN) : end])
        calls += read
        after = end + len(END)
        said.append(text[position : begin if read else after])
        position = after
    return "".join(said) + text[position:], calls


def read_tool_calls(written: str) -> list[ToolCall]:
    """Return the calls in what a model wrote between the tokens; none if it does not parse."""
    if len(written) > bounds.TOOL_CALL or len(written.encode(errors="replace")) > bounds.TOOL_CALL:
        return []
    try:
        calls = list(_from_json(written) or _from_python(written))
        _check_json(calls)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # how the parsers give up
        return []
    return calls


def _from_json(written: str) -> list[ToolCall]:
    try:
        read = json.loads(written, strict=False)  # line ends in strings
    except ValueError:
        return []
    return [_from_object(each) for each in (read if isinstance(read, list) else [read])]


def _from_object(value: Any) -> ToolCall:
    match value:
        case {"name": str(name), "arguments": dict(arguments)} if name:
            return ToolCall(name, arguments)
    raise ValueError("not an object with a name and arguments")


def _from_python(written: str) -> Iterator[ToolCall]:
    with warnings.catch_warnings():  # Python warns of "\d" on stderr, or raises it
        warnings.simplefilter("ignore")
        body = ast.parse(STRING.sub(_in_one_line, written.strip()), mode="eval").body
    for call in body.elts if isinstance(body, ast.List) else [body]:
        yield _from_call(call)


def _in_one_line(string: re.Match[str]) -> str:
    """Escape line ends in a string: models write them as they are, and so do templates."""
    return string[0].replace("\r", "\\r").replace("\n", "\\n")


def _from_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call by keywords")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("an argument without a name, or one that comes twice")
        arguments[keyword.arg] = _value(keyword.value)
    return ToolCall(_dotted(node.func), arguments)


def _dotted(node: ast.expr) -> str:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("not a name")
    return ".".join([node.id, *reversed(names)])


def _value(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):  # bool is an int
            return value
        case ast.Name(id="true" | "false" | "null" as name):
            return NAMED[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if (
            number is not True and number is not False
        ):
            return -number
    raise ValueError("not a value of JSON")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str(key)):
            return key
    raise ValueError("not a key of JSON")


def _check_json(calls: list[ToolCall]) -> None:
    """Raise `ValueError` for NaN, infinities and halves of surrogate pairs, which JSON lacks."""
    for call in calls:
        json.dumps([call.name, call.arguments], allow_nan=False, ensure_ascii=False).encode()
