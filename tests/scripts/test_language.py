"""Plain English: one form of docstrings, and no phrase that needs a second reading."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = "lfm2kit/testing/checks/"  # a check's docstring says what must hold, as a test's does

# Words that begin a docstring without a verb.
NOT_VERBS = (
    "A|All|Among|An|And|As|At|By|Each|Every|For|From|Here|How|If|In|It|Its|Never|No|None|Nobody|Of"
    "|On|One|Other|Some|The|These|This|Those|To|Under|Until|What|When|Where|Whether|Which|Who|Whom"
    "|Why|With|Without"
)

# Phrases that need a second reading, and what to write instead.
BANNED = {
    r"(?<![Tt]here )\b(is|are|was) no (?!longer|more|less|faster)[a-z]": "is not a ...",
    r"(?<![Tt]here )\b(is|are) none\b": "is not",
    r"\bso many\b(?![^.]* that )": "this many, or the number",
    r"\bin turns\b": "alternately, or one after the other",
    r"\b(expected|must be|or more|or a range|perhaps) [^.;]{0,60}, as [^ ]": "such as",
    r"\bthere is: ": "available: ",
    r'"""(Returns|Yields|Prints) ': "the imperative",  # in the code of documents, too
}


def written(*endings: str) -> list[str]:
    """Return the project's own files with these endings."""
    patterns = [f"*{ending}" for ending in endings]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split() if (ROOT / name).exists()]


def functions(file: str) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of each function in a file, but not of tests and checks."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("test_"):
            continue
        says_what_holds = file.startswith(CHECKS) and not node.name.startswith("_")
        if not says_what_holds and (text := ast.get_docstring(node)):
            yield node.name, text


def is_imperative(docstring: str) -> bool:
    """Return whether a docstring begins with a verb that could be an imperative."""
    first = re.match(r"[A-Z][a-z]*\b", docstring)
    if first is None or re.fullmatch(NOT_VERBS, first[0]):
        return False
    return first[0].endswith("ss") or not first[0].endswith("s")


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the bytes.", True),
        ("Pass the bytes on.", True),
        ("Returns the bytes.", False),
        ("The bytes that it takes.", False),
        ("Of shared memory that a block can have.", False),
        ("`auto` spelt out.", False),
    ],
)
def test_a_docstring_of_another_form_is_seen(docstring: str, expected: bool) -> None:
    assert is_imperative(docstring) == expected


def test_docstrings_of_functions_begin_with_a_verb_in_the_imperative() -> None:
    found = [
        f"{file}: {name}: {text.splitlines()[0]}"
        for file in written(".py")
        for name, text in functions(file)
        if not is_imperative(text)
    ]
    assert not found, "\n".join(found)


def phrases(text: str) -> list[str]:
    """Return the banned phrases of a text, also those that are broken over lines or strings."""
    in_one_line = re.sub(r'"?\n[ #*/>|]*f?"?', " ", text)
    return [
        f"{found[0]!r}: write {instead!r}"
        for pattern, instead in BANNED.items()
        for found in re.finditer(pattern, re.sub(" +", " ", in_one_line))
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("rule is no array of tables", 1),
        ("'x' is no\n# layer", 1),
        ("there is no folder, and it is no longer read; one is no faster", 0),
        ("of so many samples one", 1),
        ("so many values that it spills", 0),
        ('"expected a number of 1 or more, as "\n    "-n 1"', 1),
        ("unknown backend 'x'; there is: cuda", 1),
    ],
)
def test_a_banned_phrase_is_seen(text: str, count: int) -> None:
    assert len(phrases(text)) == count


def test_no_text_has_a_banned_phrase() -> None:
    own = str(Path(__file__).relative_to(ROOT))
    files = written(".py", ".md", ".cu", ".cuh", ".sh", ".toml")
    texts = {file: (ROOT / file).read_text() for file in files if file != own}
    found = [f"{file}: {said}" for file, text in texts.items() for said in phrases(text)]
    assert not found, "\n".join(found)


def test_decisions_have_headings_with_their_numbers() -> None:
    pages = [ROOT / file for file in written(".md") if re.match(r"docs/decisions/\d", file)]
    assert pages
    headings = {page.name: page.read_text().partition("\n")[0] for page in pages}
    wrong = {
        name: heading
        for name, heading in headings.items()
        if not re.fullmatch(rf"# {name[:4]}: \S.*[^.]", heading)
    }
    assert not wrong, wrong
