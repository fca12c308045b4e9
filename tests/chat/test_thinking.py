"""Thoughts: tags cut anywhere, tags that lack their other, and nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfm2kit.chat.thinking import BEGIN, END, Part, Thinking, begins_in_thought

PIECES = [BEGIN, END, "<", "</", "think>", "<think", "a", "\n", "<<think>"]


def split(pieces: list[str], begun: bool = False) -> list[Part]:
    """Return the parts of a text, neighbours of one kind joined."""
    thinking = Thinking(begun)
    parts = [part for piece in pieces for part in thinking.push(piece)] + thinking.finish()
    assert all(part.text for part in parts)
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].is_thought == part.is_thought:
            part = Part(joined.pop().text + part.text, part.is_thought)
        joined.append(part)
    return joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", False)]),
        ("<think>b</think>c", [("b", True), ("c", False)]),
        ("a<think>b</think>c<think>d", [("a", False), ("b", True), ("c", False), ("d", True)]),
        ("<think></think>c", [("c", False)]),
        ("<think>a<think>b</think>", [("a<think>b", True)]),
        ("a</think>b", [("a</think>b", False)]),
        ("a <thin", [("a <thin", False)]),
        ("<think>a</thin", [("a</thin", True)]),
        ("", []),
    ],
)
def test_text_is_split_at_its_tags(text: str, expected: list[tuple[str, bool]]) -> None:
    assert split([text]) == expected
    assert split(list(text)) == expected


def test_a_text_may_begin_within_a_thought() -> None:
    assert split(["b</think>c"], begun=True) == [("b", True), ("c", False)]


def by_partition(text: str, inside: bool) -> list[Part]:
    """Return the parts of a whole text."""
    parts: list[Part] = []
    while text:
        before, _, text = text.partition(END if inside else BEGIN)
        if before and parts and parts[-1].is_thought == inside:
            before = parts.pop().text + before
        parts += [Part(before, inside)] if before else []
        inside = not inside
    return parts


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.booleans())
@example(["<<think>", "a"], False)
def test_parts_do_not_depend_on_where_the_text_is_cut(pieces: list[str], begun: bool) -> None:
    text = "".join(pieces)
    whole = split([text], begun)
    assert split(pieces, begun) == split(list(text), begun) == whole
    assert whole == by_partition(text, begun)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "<", "th", "\n"]), max_size=8))
def test_text_comes_as_soon_as_it_cannot_begin_a_tag(pieces: list[str]) -> None:
    thinking, shown, text = Thinking(), "", ""
    for piece in pieces:
        text += piece
        shown += "".join(part.text for part in thinking.push(piece))
        held = max((n for n in range(len(BEGIN)) if text.endswith(BEGIN[:n])), default=0)
        assert shown == text[: len(text) - held]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<|im_start|>assistant\n<think>\n", True), ("<think>", True), ("<think>a", False)],
)
def test_a_prompt_may_begin_a_thought(prompt: str, expected: bool) -> None:
    assert begins_in_thought(prompt) == expected
