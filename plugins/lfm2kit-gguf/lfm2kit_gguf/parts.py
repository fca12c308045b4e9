"""The files that a model may be split into: NAME-00001-of-00003.gguf and so on.

The first one has the keys, and each has some of the tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lfm2kit.errors import Lfm2kitError
from lfm2kit_gguf.header import Header

NAME = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
NUMBER, COUNT = "split.no", "split.count"  # keys of each part


def headers_of(path: Path) -> list[Header]:
    """Return the headers of all files of a model; `path` is the first of them.

    Raise `Lfm2kitError` for another one than the first, and for one that is missing.
    """
    first = Header(path)
    count = first.value(COUNT)
    if count in (None, 0, 1):
        return [first]
    named = _named(path, count)
    if first.value(NUMBER) != 0:
        raise Lfm2kitError(f"{path}: a part of a model in {count} files; give {named[0]}")
    headers = [first]
    for number, part in enumerate(named[1:], 1):
        if not part.is_file():
            raise Lfm2kitError(f"{path}: a part of a model in {count} files; there is no {part}")
        headers.append(header := Header(part))
        if (header.value(NUMBER), header.value(COUNT)) != (number, count):
            raise Lfm2kitError(f"{part}: not part {number + 1} of {count} of {path}")
    return headers


def _named(path: Path, count: Any) -> list[Path]:
    """Return the paths of all parts, by the name of one of them."""
    named = NAME.fullmatch(path.name)
    if named is None or int(named[2]) != count:
        raise Lfm2kitError(
            f"{path}: a part of a model in {count!r} files, but its name does not end so; "
            "name them as they were: NAME-00001-of-00002.gguf"
        )
    last = int(named[2])
    return [path.with_name(f"{named[1]}-{i:05}-of-{last:05}.gguf") for i in range(1, last + 1)]
