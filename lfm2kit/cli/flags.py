"""Writes the options that a sentence names as flags: `Option("threads", 8)` as `--threads 8`."""

from __future__ import annotations

import os
import shlex
from dataclasses import fields

from lfm2kit.building.options import Options
from lfm2kit.errors import Lfm2kitError, Option

VARIABLES = {f.name: v for f in fields(Options) if (v := f.metadata["about"].variable)}


def flag(option: Option) -> str:
    """Return the words to type for an option; the environment variable, if it says the same.

    An option with several values is repeated.
    """
    if isinstance(option.value, (list, tuple)) and option.value:
        return " ".join(flag(option._replace(value=one)) for one in option.value)
    variable = VARIABLES.get(option.name, "")
    if option.value is not None and os.environ.get(variable) == option.value:
        return f"{variable}={option.value}"
    name = f"-{option.name}" if len(option.name) == 1 else f"--{option.name.replace('_', '-')}"
    is_flag = option.value is None or option.value is True
    return name if is_flag else f"{name} {shlex.quote(str(option.value))}"


def told(error: Lfm2kitError) -> str:
    """Return the sentence of an error as the command line says it."""
    return error.sentence(flag)
