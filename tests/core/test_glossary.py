"""docs/glossary.md gives each word one meaning, and the other pages use its words."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = [
    *(page for page in ROOT.glob("docs/**/*.md") if page != GLOSSARY),
    *ROOT.glob("*.md"),
    *ROOT.glob("backends/*/README.md"),
    *ROOT.glob("plugins/*/README.md"),
]
OTHER_WORDS = {  # what other projects say
    "multiprocessor": "SM",
    "thread block": "CTA",
    "threadblock": "CTA",
    "CUDA event": "mark",
    "KV cache": "state",
}


def test_a_word_is_explained_once() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    words = Counter(word for row in rows for word in row.split(", "))
    assert len(words) >= 20
    assert max(words.values()) == 1, words.most_common(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_words_of_the_glossary(page: Path) -> None:
    text = " ".join(page.read_text(encoding="utf-8").split()).lower()
    assert [word for word in OTHER_WORDS if word.lower() in text] == []
