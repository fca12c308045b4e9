"""Imports the libraries of the extra `chat`, or says in one line how to install them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lfm2kit.errors import Lfm2kitError


def library(name: str) -> Any:
    """Return the module `name`; raise `Lfm2kitError` if it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Lfm2kitError(
            f"text needs the package {name.partition('.')[0]}, which cannot be imported ({error}); "
            "type: pip install 'lfm2kit[chat]'"
        ) from None
