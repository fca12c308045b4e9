"""How the commands of this folder end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lfm2kit.errors import Lfm2kitError


@contextmanager
def ended() -> Iterator[None]:
    """Turn an error that the user can act on into one line on stderr and exit code 2."""
    try:
        yield
    except Lfm2kitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
