"""Paragraphs, and what of them is held out."""

from __future__ import annotations

import pytest

from tests.training.archives import ar_of, block, tar_of
from training.texts import (
    AUSTEN_DATA,
    LONGEST,
    MOBY_DICK,
    MOBY_DICK_FILES,
    SHORTEST,
    SPEECHES,
    Text,
    novels_of,
    paragraphs,
    speeches_of,
    split_books,
    split_speeches,
    turns,
)


def test_novels_are_austens_in_the_packages_order_and_moby_dick_by_chapters() -> None:
    vectors = [block([f"BOOK {n}", "", "It is a", "truth."]) for n in range(6)]
    austen = ar_of({"data.tar.xz": tar_of({f"./{AUSTEN_DATA}Rdata.rdb": b"".join(vectors)})})
    chapters = {f"{MOBY_DICK}{n}": n.replace("_", " ").encode() for n in MOBY_DICK_FILES}
    novels = novels_of(tar_of(chapters | {f"{MOBY_DICK}contents.txt": b"no"}, "w:gz"), austen)
    assert [n.name for n in novels[:2]] == ["Emma", "Mansfield Park"]
    assert [n.paragraphs for n in novels[:2]] == [(f"BOOK {n}", "It is a truth.") for n in (0, 1)]
    assert novels[-1].name == "Moby Dick"
    assert novels[-1].paragraphs[1:3] == ("chapter 2.txt", "chapter 3.txt")
    assert (len(novels[-1].paragraphs), novels[-1].paragraphs[-1]) == (136, "epilogue.txt")


def test_speeches_are_the_text_files_by_year() -> None:
    files = {
        "1801_b.txt": b"two",
        "1790_a.txt": b"one",
        "1790_a.json": b"{}",
        "file_list.json": b"",
    }
    speeches = speeches_of(tar_of({f"{SPEECHES}{k}": v for k, v in files.items()}, "w:gz"))
    assert speeches == [Text("1790_a", ("one",)), Text("1801_b", ("two",))]


def test_lines_are_joined_and_blank_lines_separate() -> None:
    text = "It is a\ntruth.\n\n \n\n  Mr. Bennet  \nwas so odd.\n"
    assert list(paragraphs(text)) == ["It is a truth.", "Mr. Bennet was so odd."]


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("\N{LEFT DOUBLE QUOTATION MARK}No\N{RIGHT DOUBLE QUOTATION MARK}", '"No"'),
        ("it\N{RIGHT SINGLE QUOTATION MARK}s", "it's"),
        ("ago\N{EM DASH}never", "ago--never"),
        ("_she_ knew", "she knew"),
        ("Thank you. (Applause.) Thank you. [laughter]", "Thank you. Thank you."),
        ("for £5 (pounds)", "for £5 (pounds)"),
    ],
)
def test_characters_are_plain(written: str, plain: str) -> None:
    assert list(paragraphs(written)) == [plain]


def test_long_paragraphs_are_broken_at_sentences_and_lose_nothing() -> None:
    sentences = [f'Mr. Smith said "{"so " * n}is it." He left?' for n in range(60)]
    long = " ".join(sentences)
    parts = list(paragraphs(long))
    assert " ".join(parts) == long
    assert len(parts) > 2
    for part in parts:
        assert part.startswith(("Mr. ", "He "))
        assert len(part) <= LONGEST
    assert min(map(len, parts[:-1])) >= SHORTEST


def test_three_percent_of_each_books_end_are_held_out() -> None:
    lines = tuple(f"line {n:05}" for n in range(1000))
    split = split_books([Text("a", lines), Text("b", lines[:100])])
    assert [t.name for t in split.learnt] == [t.name for t in split.held_out] == ["a", "b"]
    assert split.learnt[0].paragraphs == lines[:970]
    assert split.held_out[0].paragraphs == lines[970:]
    assert split.held_out[1].paragraphs == lines[97:100]


def test_every_40th_speech_is_held_out() -> None:
    speeches = [Text(str(n), (f"speech {n}",)) for n in range(1, 234)]
    split = split_speeches(speeches)
    assert [t.name for t in split.held_out] == ["40", "80", "120", "160", "200"]
    assert len(split.learnt) == 228
    assert not set(split.learnt) & set(split.held_out)


def test_turns_are_two_questions_with_answers_of_short_paragraphs() -> None:
    book = Text("a", ("one", "x" * 401, "two", "three", "four", "five"))
    assert turns([book]) == [
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    ]
