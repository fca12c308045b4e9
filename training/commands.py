"""How the commands of this folder end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lfm2kit.errors import Lfm2kitError

PACKAGES = ("tokenizers", "torch", "transformers")  # which lfm2kit does not depend on


@contextmanager
def ended() -> Iterator[None]:
    """Turn an error that the user can act on into one line on stderr and exit code 2.

    That includes a package of `PACKAGES` that is not installed: commands import these within.  An
    interrupted command exits with 130.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        install = f"pip install {' '.join(PACKAGES)}"
        said = f"there is no {error.name}; type '{install}', as training/README.md says"
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    except (Lfm2kitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def whole(text: str) -> int:
    """Return the option's whole number of 0 or more; `41e6` is one."""
    wrong = argparse.ArgumentTypeError(f"{text}: expected a whole number, such as 512 or 41e6")
    try:
        number = int(text) if text.isdecimal() else float(text)
        if number < 0 or number != int(number):
            raise wrong
    except (ValueError, OverflowError):  # not a number, nan, or infinite
        raise wrong from None
    return int(number)
