"""Writes the options that a sentence names as flags: `Option("threads", 8)` as `--threads 8`."""

from __future__ import annotations

import shlex

from lfm2kit.errors import Lfm2kitError, Option


def flag(option: Option) -> str:
    """Returns the words to type for an option."""
    name = f"-{option.name}" if len(option.name) == 1 else f"--{option.name.replace('_', '-')}"
    is_flag = option.value is None or option.value is True
    return name if is_flag else f"{name} {shlex.quote(str(option.value))}"


def told(error: Lfm2kitError) -> str:
    """Returns the sentence of an error as the command line says it."""
    return error.sentence(flag)
