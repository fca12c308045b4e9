"""Options that say which tokens may come, and that users write in another way than in Python.

A command line has files, and pairs of a token and its bias, where Python and JSON have data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lfm2kit import bounds
from lfm2kit.building.options import option
from lfm2kit.checkpoint.documents import read_text
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.generating.options import Generation

GIVEN_HERE = ("logit_bias", "json_schema", "regex", "grammar")  # not as fields of `Generation`
PAIR = re.compile(r"([0-9]{1,18})=([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)")
FOUR_BYTES = 4  # of a character in UTF-8, at the most


@dataclass(frozen=True, slots=True, kw_only=True)
class Restrictions:
    """What restricts the tokens of an answer, as it is typed."""

    logit_bias: list[str] | None = option(
        None,
        "Add VALUE to the logit of the token ID; repeat the option for several.",
        words="none",
        metavar="ID=VALUE",
    )
    json_schema: str | None = option(
        None,
        "Answer in JSON of this schema: a file, or the schema itself, which begins with {.",
        words="any text",
        metavar="FILE|JSON",
    )
    regex: str | None = option(
        None,
        "Answer with a text that this regular expression, in Rust's syntax, matches as a whole.",
        words="any text",
        metavar="REGEX",
    )
    grammar: Path | None = option(
        None,
        "Answer with a text of the grammar in this file, in llguidance's form of Lark's.",
        words="any text",
        metavar="FILE",
    )

    def added_to(self, generation: Generation) -> Generation:
        """Return the options with these; `Lfm2kitError` for one that is wrong or unreadable."""
        if self.json_schema == "":
            raise Lfm2kitError(Option("json_schema", ""), ": expected a file or a schema in JSON")
        return replace(
            generation,
            logit_bias=None if self.logit_bias is None else _biases(self.logit_bias),
            json_schema=_text_of(path) if (path := self._schema_file) else self.json_schema,
            regex=self.regex,
            grammar=None if self.grammar is None else _text_of(self.grammar),
        )

    def paths(self) -> dict[str, Path | None]:
        """Return the paths that are given, by option."""
        return {"--json-schema": self._schema_file, "--grammar": self.grammar}

    def reads(self) -> dict[str, list[Path]]:
        """Return the files that are read, by what they are called."""
        paths = [path for path in self.paths().values() if path is not None]
        return {"the schema or the grammar": paths}

    @property
    def _schema_file(self) -> Path | None:
        text = self.json_schema
        return None if text is None or text.lstrip().startswith("{") else Path(text)


def _text_of(path: Path) -> str:
    return read_text(path, bounds.CONSTRAINT * FOUR_BYTES)


def _biases(texts: Iterable[str]) -> dict[int, float]:
    """Return the biases by token; `Lfm2kitError` for a text of another form."""
    biases: dict[int, float] = {}
    for text in texts:
        if (pair := PAIR.fullmatch(text)) is None:
            example = ": expected a token id and a number, such as ", Option("logit_bias", "42=-5")
            raise Lfm2kitError(Option("logit_bias", text), *example)
        one, bias = int(pair[1]), float(pair[2])
        if one in biases:
            raise Lfm2kitError(Option("logit_bias", text), f": token {one} has a bias already")
        biases[one] = bias
    return biases
